"""Card files and checkpoints into the catalog: what changes, what is refused, what stays."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lading.cards.card import ArchitectureEntry, CardEntry
from lading.cards.card_file import CardFile
from lading.catalog.check import check_catalog
from lading.catalog.checkpoints.record import record_checkpoint, record_companions, record_files
from lading.catalog.database.database import Database
from lading.catalog.import_cards import collect, import_files
from lading.catalog.importing import refresh
from lading.catalog.importing.changes import MAX_DEPTH
from lading.catalog.open import open_catalog
from lading.catalog.query import run_query as query
from lading.catalog.records import Check, CheckpointContents, CopyKind, ImportReport, LocalCopy
from lading.catalog.store import AssetStore
from lading.errors import CardFileError
from lading.formats.manifest import Manifest
from lading.system.filesystem import FileStat
from tests.helpers.catalog_tools import card_file, make_copies, make_manifest, settings_in

CARDS = """\
name: base
model_family: qwen
model_config: {dropout_p: 0.1}
---
name: leaf
base: base
model_arch: tiny
checkpoint: hg://org/leaf
license: mit
---
name: leaf@user
checkpoint: /data/leaf
---
architecture: tiny
family: qwen
config: {num_layers: 2}
"""


@pytest.fixture
def database(any_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    (tmp_path / "seeds").mkdir()
    monkeypatch.setattr(refresh, "files", lambda package: tmp_path / "seeds")
    return open_catalog(settings_in(tmp_path))


def rows(database: Database, sql: str) -> list[tuple[object, ...]]:
    return query(database, sql).rows


def cards(database: Database) -> dict[str, str]:
    return dict(rows(database, "SELECT name || CASE env WHEN '' THEN '' ELSE '@' END || env, metadata FROM cards"))  # type: ignore[arg-type]


def assert_consistent(tmp_path: Path) -> None:
    assert check_catalog(settings_in(tmp_path)) == []


# --- what changes ----------------------------------------------------------------------------------------------------


def test_import(tmp_path: Path, database: Database) -> None:
    report = import_files(database, [card_file(CARDS)])
    assert report == ImportReport(added=("base", "leaf", "leaf@user", "qwen/tiny (architecture)"))
    assert rows(
        database,
        "SELECT name, env, base, family, arch, checkpoint_uri, license, gated, problem, position, folder FROM cards "
        "ORDER BY id",
    ) == [
        ("base", "", None, "qwen", None, None, None, 1, None, 0, "/cards"),
        ("leaf", "", "base", "qwen", "tiny", "hg://org/leaf", "mit", 0, None, 1, "/cards"),
        ("leaf", "user", None, None, None, None, None, 0, None, 2, "/cards"),
    ]
    assert rows(database, "SELECT uri, kind, length(sha256), problems FROM sources") == [
        ("file:///cards/a.yaml", "import", 64, None)
    ]
    assert_consistent(tmp_path)


def test_importing_again_changes_nothing(tmp_path: Path, database: Database) -> None:
    import_files(database, [card_file(CARDS)])
    before = rows(database, "SELECT * FROM cards")
    report = import_files(database, [card_file(CARDS)])
    assert report == ImportReport(unchanged=("base", "leaf", "leaf@user", "qwen/tiny (architecture)"))
    assert rows(database, "SELECT * FROM cards") == before


def test_a_change_and_a_removal(tmp_path: Path, database: Database) -> None:
    import_files(database, [card_file(CARDS)])
    changed = CARDS.replace("num_layers: 2", "num_layers: 3").replace("license: mit", "license: bsd")
    changed = changed.replace("name: leaf@user\ncheckpoint: /data/leaf\n---\n", "") + "---\nname: new\n"
    report = import_files(database, [card_file(changed)])
    assert report.added == ("new",)
    assert report.changed == ("leaf", "qwen/tiny (architecture)")
    assert report.unchanged == ("base",)
    assert report.removed == ("leaf@user",)
    assert rows(database, "SELECT license FROM cards WHERE name = 'leaf'") == [("bsd",)]
    assert rows(database, "SELECT config FROM architectures") == [('{"num_layers":3}',)]
    assert_consistent(tmp_path)


def test_the_order_of_fields_is_no_change(database: Database) -> None:
    import_files(database, [card_file("name: a\nx: 1\ny: {b: 2, c: 3}\n")])
    assert import_files(database, [card_file("y: {c: 3, b: 2}\nname: a\nx: 1\n")]).unchanged == ("a",)


def test_a_card_that_moves_in_its_file(database: Database) -> None:
    import_files(database, [card_file("name: a\n---\nname: b\n")])
    report = import_files(database, [card_file("name: new\n---\nname: b\n---\nname: a\n")])
    assert report.unchanged == ("a", "b")
    assert rows(database, "SELECT name, position FROM cards ORDER BY 2") == [("new", 0), ("b", 1), ("a", 2)]


def test_a_card_that_moves_to_another_file(tmp_path: Path, database: Database) -> None:
    a, b = "file:///cards/a.yaml", "file:///cards/b.yaml"
    import_files(database, [card_file("name: x\nv: 1\n---\nname: y\n", a), card_file("name: z\n", b)])
    report = import_files(database, [card_file("name: y\n", a), card_file("name: z\n---\nname: x\nv: 2\n", b)])
    assert report.changed == ("x",)
    assert report.removed == ()
    assert rows(database, "SELECT s.uri FROM cards c JOIN sources s ON s.id = c.source_id WHERE c.name = 'x'") == [(b,)]
    assert_consistent(tmp_path)


def test_a_dry_run_changes_nothing(database: Database) -> None:
    report = import_files(database, [card_file(CARDS)], dry_run=True)
    assert len(report.added) == 4
    assert cards(database) == {}
    assert rows(database, "SELECT count(*) FROM sources") == [(0,)]


def test_stdin_withdraws_nothing(database: Database) -> None:
    import_files(database, [card_file("name: a\n", "stdin")])
    report = import_files(database, [card_file("name: b\n", "stdin")])
    assert (report.added, report.removed) == (("b",), ())
    assert import_files(database, [card_file("name: a\nv: 2\n", "stdin")]).changed == ("a",)


def test_no_files_change_nothing(database: Database) -> None:
    assert import_files(database, []) == ImportReport()


# --- what it resolves to ---------------------------------------------------------------------------------------------


def test_descendants_follow_their_bases(tmp_path: Path, database: Database) -> None:
    import_files(database, [card_file("name: a\nmodel_family: one\n", "file:///c/a.yaml")])
    heirs = "".join(f"name: h{i}\nbase: {f'h{i - 1}' if i else 'a'}\n---\n" for i in range(5))
    import_files(database, [card_file(heirs + "name: side\n", "file:///c/h.yaml")])
    assert rows(database, "SELECT DISTINCT family FROM cards WHERE name LIKE 'h%'") == [("one",)]

    import_files(database, [card_file("name: a\nmodel_family: two\nlicense: mit\n", "file:///c/a.yaml")])
    assert rows(database, "SELECT DISTINCT family, license FROM cards WHERE name LIKE 'h%'") == [("two", "mit")]
    assert rows(database, "SELECT name FROM families WHERE entry_point IS NULL") == [("two",)]  # `one` is not named
    assert_consistent(tmp_path)

    import_files(database, [card_file("name: other\n", "file:///c/a.yaml")])
    assert rows(database, "SELECT count(*), count(problem), count(family) FROM cards WHERE name LIKE 'h%'") == [
        (5, 5, 0)
    ]
    assert_consistent(tmp_path)

    import_files(database, [card_file("name: a\nmodel_family: three\n", "file:///c/b.yaml")])
    assert rows(database, "SELECT count(problem), max(family) FROM cards WHERE name LIKE 'h%'") == [(0, "three")]
    assert_consistent(tmp_path)


def test_files_come_in_any_order(tmp_path: Path, database: Database) -> None:
    report = import_files(database, [card_file("name: leaf\nbase: root\n", "file:///c/leaf.yaml")])
    assert report.warnings == ("leaf.yaml[0]: the card 'leaf' is based on 'root', which is not in the catalog",)
    (model,) = AssetStore(database).models()
    assert model.status == "broken"
    assert model.problem is not None
    assert "not in the catalog (leaf.yaml[0])" in model.problem

    assert import_files(database, [card_file("name: root\nmodel_family: qwen\n", "file:///c/r.yaml")]).warnings == ()
    assert [m.problem for m in AssetStore(database).models(include_all=True)] == [None, None]
    assert_consistent(tmp_path)


def test_a_card_with_a_field_of_a_wrong_type_goes_in(database: Database) -> None:
    """Files are checked in form, but rows may come from elsewhere: a problem is reported and breaks nothing."""
    entry = CardEntry(name="odd", metadata={"model_family": 3, "checkpoint": ["x"], "license": 1}, source="x.yaml[0]")
    file = replace(card_file(""), cards=(entry,), problems=())
    import_files(database, [file])
    ((problem, family),) = rows(database, "SELECT problem, family FROM cards")
    assert family is None
    assert "'model_family'" in str(problem)
    assert "'checkpoint'" in str(problem)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), {1, 2}, b"bytes", "half \ud800", {"deep": [object()]}],
    ids=["nan", "inf", "set", "bytes", "surrogate", "object"],
)
def test_what_json_cannot_express(database: Database, value: object) -> None:
    good = CardEntry(name="good", metadata={}, source="x.yaml[0]")
    bad = CardEntry(name="bad", metadata={"v": value}, source="x.yaml[1]")
    file = replace(card_file(""), cards=(good, bad), problems=())
    with pytest.raises(CardFileError, match=r"x\.yaml\[1\]: 'bad' holds a value that JSON cannot express"):
        import_files(database, [file])
    report = import_files(database, [file], keep_going=True)
    assert (report.added, len(report.problems)) == (("good",), 1)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_all_problems_of_all_files_are_listed(database: Database) -> None:
    files = [
        card_file("name: a\n---\nnome: x\n---\nname: b\nmodel_family: 3\n", "file:///c/one.yaml"),
        card_file("name: c\n---\n- 1\n", "file:///c/two.yaml"),
    ]
    with pytest.raises(CardFileError, match="Nothing was imported") as caught:
        import_files(database, files)
    assert [p.partition(":")[0].partition(".model")[0] for p in caught.value.problems] == [
        "one.yaml[1]", "one.yaml[2]", "two.yaml[1]",
    ]  # fmt: skip
    assert cards(database) == {}

    report = import_files(database, files, keep_going=True)
    assert report.added == ("a", "c")
    assert report.problems == caught.value.problems
    ((problems,),) = rows(database, "SELECT problems FROM sources WHERE uri LIKE '%one.yaml'")
    assert str(problems).count("\n") == 1


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("address", "scheme"),
    [
        ("s4://bucket/ft?X-Amz-Signature=secret", "s4"), ("S4://bucket/ft", "s4"), ("gcs://b/x", "gcs"),
        ("ftp://h/x", "ftp"),
        ("abfs+x://b/x", "abfs+x"), ("mailto:me", "mailto"), (" s4://b/x;gated=false ", "s4"), ("htps://h/x", "htps"),
    ],
)  # fmt: skip
def test_an_address_that_nothing_reads(tmp_path: Path, database: Database, address: str, scheme: str) -> None:
    far = f"name: far\nmodel_family: qwen\ncheckpoint: {address!r}\n"
    with pytest.raises(CardFileError) as error:
        import_files(database, [card_file(f"{CARDS}---\n{far}---\nname: far@user\ncheckpoint: {address!r}\n")])
    assert [line.partition(": ")[0] for line in error.value.problems] == [
        "a.yaml[4].checkpoint",
        "a.yaml[5].checkpoint",
    ]
    assert all(f"no installed source reads {scheme}://" in line for line in error.value.problems)
    assert "hg://, hf://, https://, http://" in str(error.value)
    assert "secret" not in str(error.value)
    assert ("Did you mean 'https'" in str(error.value)) == (scheme == "htps")
    assert "hf://, https://, http://, s3://, gs://, az://" in str(error.value)
    assert cards(database) == {}

    report = import_files(database, [card_file(f"{far}---\nname: near\n")], keep_going=True)
    assert (report.added, len(report.problems)) == (("near",), 1)

    # A card that is there stays as it was.
    import_files(database, [card_file(far.replace(address, "hg://a/b"), "file:///cards/b.yaml")])
    report = import_files(database, [card_file(far, "file:///cards/b.yaml")], keep_going=True)
    assert (report.changed, report.removed, len(report.problems)) == ((), (), 1)
    assert rows(database, "SELECT checkpoint_uri FROM cards WHERE name = 'far'") == [("hg://a/b",)]
    assert_consistent(tmp_path)


def test_addresses_that_go_in(database: Database) -> None:
    addresses = (
        "hg://a/b", "HF://a/b", "https://h/x", "http://h/x", "file:///x", "/x", "x", "./x", "~/x", "c:/x", "a/s3", "s3",
        "ftp://b/x;gated=true", "mailto:me;gated=true", "s3://bucket/x", "S3://bucket/x", "gs://bucket/x", "az://bucket",
    )  # fmt: skip
    text = "---\n".join(f"name: a{i}\ncheckpoint: {address!r}\n" for i, address in enumerate(addresses))
    assert len(import_files(database, [card_file(text)]).added) == len(addresses)


def test_a_document_that_broke_keeps_its_card(database: Database) -> None:
    import_files(database, [card_file("name: a\nv: 1\n---\nname: b\n---\nname: c\n")])
    report = import_files(database, [card_file("name: a\nv: 2\n---\nname: [b]\n")], keep_going=True)
    assert (report.changed, report.removed, len(report.problems)) == (("a",), (), 1)
    assert cards(database).keys() == {"a", "b", "c"}


def test_another_source_with_the_same_content(database: Database) -> None:
    import_files(database, [card_file(CARDS, "file:///x/a.yaml")])
    again = card_file(CARDS, "file:///y/a.yaml")
    assert import_files(database, [again]).unchanged == ("base", "leaf", "leaf@user", "qwen/tiny (architecture)")
    assert rows(database, "SELECT DISTINCT folder FROM cards") == [("/x",)]


def test_the_same_relative_path_elsewhere_is_another_content(database: Database) -> None:
    import_files(database, [card_file("name: a\ncheckpoint: ./weights\n", "file:///x/a.yaml")])
    with pytest.raises(CardFileError, match="already described differently"):
        import_files(database, [card_file("name: a\ncheckpoint: ./weights\n", "file:///y/a.yaml")])


def test_another_source_with_another_content(tmp_path: Path, database: Database) -> None:
    import_files(database, [card_file(CARDS, "file:///x/a.yaml")])
    other = card_file("name: leaf\nv: 1\n---\narchitecture: tiny\nfamily: qwen\n", "file:///y/b.yaml")
    with pytest.raises(CardFileError, match="--replace") as caught:
        import_files(database, [other])
    assert caught.value.problems == (
        "b.yaml[0]: 'leaf' is already described differently by a.yaml[1] (file:///x/a.yaml). "
        "Rename it, or replace the other one with `--replace`.",
        "b.yaml[1]: 'qwen/tiny (architecture)' is already described differently by a.yaml[3] (file:///x/a.yaml). "
        "Rename it, or replace the other one with `--replace`.",
    )

    report = import_files(database, [other], replace=True)
    assert report.changed == ("leaf", "qwen/tiny (architecture)")
    assert json.loads(cards(database)["leaf"]) == {"v": 1}
    assert_consistent(tmp_path)

    # The card is the other file's now: the first one neither withdraws nor overrides it.
    assert import_files(database, [card_file("name: base\n", "file:///x/a.yaml")]).removed == ("leaf@user",)
    assert "leaf" in cards(database)


def test_two_files_of_one_import_that_disagree(database: Database) -> None:
    files = [card_file("name: a\nv: 1\n", "file:///c/a.yaml"), card_file("name: a\nv: 2\n", "file:///c/b.yaml")]
    for options in ({}, {"replace": True}):
        with pytest.raises(CardFileError, match=r"b\.yaml\[0\]: 'a' is already described by a\.yaml\[0\]"):
            import_files(database, files, **options)
    assert import_files(database, files, keep_going=True).added == ("a",)
    assert json.loads(cards(database)["a"]) == {"v": 1}


def test_two_files_of_one_import_that_agree(database: Database) -> None:
    files = [card_file("name: a\nv: 1\n", "file:///c/a.yaml"), card_file("v: 1\nname: a\n", "file:///c/b.yaml")]
    assert import_files(database, files).added == ("a",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nbase: a\n", "the bases of the card 'a' form a cycle: a → a"),
        ("name: a\nbase: b\n---\nname: b\nbase: c\n---\nname: c\nbase: a\n", "a → b → c → a"),
        (
            "architecture: a\nfamily: f\nbase: b\n---\narchitecture: b\nfamily: f\nbase: a\n",
            "the bases of the architecture 'a' form a cycle: a → b → a",
        ),
    ],
)
def test_a_cycle_of_bases(database: Database, text: str, words: str) -> None:
    with pytest.raises(CardFileError, match=words):
        import_files(database, [card_file(text)])
    report = import_files(database, [card_file(text + "---\nname: fine\n")], keep_going=True)
    assert len(set(report.problems)) == text.count("base:")
    assert report.added == ("fine",)


def test_a_cycle_through_the_catalog(tmp_path: Path, database: Database) -> None:
    import_files(database, [card_file("name: a\n---\nname: b\nbase: a\n---\nname: c\nbase: b\n")])
    with pytest.raises(CardFileError, match="a → c → b → a"):
        import_files(database, [card_file("name: a\nbase: c\n", "file:///c/x.yaml")], replace=True)
    with pytest.raises(CardFileError, match="cycle"):
        import_files(database, [card_file("name: a\nbase: c\n---\nname: b\nbase: a\n---\nname: c\nbase: b\n")])
    assert_consistent(tmp_path)


def test_a_tower_of_bases(database: Database) -> None:
    text = "".join(f"name: t{i}\nbase: t{i + 1}\n---\n" for i in range(MAX_DEPTH + 20)) + f"name: t{MAX_DEPTH + 20}\n"
    with pytest.raises(CardFileError, match="has more than 99 bases above it") as caught:
        import_files(database, [card_file(text)])
    assert len(caught.value.problems) == 21


def test_warnings(database: Database) -> None:
    text = (
        "name: a\nmodel_family: nobody\n---\nname: b\nbase: nowhere\n---\nname: c@user\n---\n"
        "architecture: x\nfamily: qwen\nbase: y\n"
    )
    assert import_files(database, [card_file(text)]).warnings == (
        "a.yaml[1]: the card 'b' is based on 'nowhere', which is not in the catalog",
        "a.yaml[2]: the card 'c' for the overlay 'user' does not exist",
        "a.yaml[3]: the qwen architecture 'x' is based on 'y', which is not in the catalog",
        "no installed package registers the model family 'nobody', so a cannot be loaded; install it, or see "
        "`lading families`",
    )
    many = "".join(f"name: m{i}\nmodel_family: nobody\n---\n" for i in range(5)) + "name: z\n"
    (warning,) = import_files(database, [card_file(many, "file:///c/m.yaml")]).warnings
    assert "so m0, m1, m2 and 2 more cannot be loaded" in warning


# --- collect ---------------------------------------------------------------------------------------------------------


def test_collect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cards"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.yml").write_text("name: b\nmodel_family: 3\n")
    (folder / "a.yaml").write_text("name: a\n")
    (folder / "deep" / "c.jsonl").write_text('{"name": "c"}\n{"name": "d"}\n')
    (folder / "notes.txt").write_text("not a card")
    (tmp_path / "odd.txt").write_text("name: odd\n")

    monkeypatch.chdir(tmp_path)
    files = collect(["cards", Path("odd.txt"), "cards/a.yaml", "-"], stdin=io.BytesIO(b"name: piped\n"))
    assert [f.source for f in files] == [
        f"file://{folder}/a.yaml",
        f"file://{folder}/b.yml",
        f"file://{folder}/deep/c.jsonl",
        f"file://{tmp_path}/odd.txt",
        "stdin",
    ]
    assert [[c.name for c in f.cards] for f in files] == [["a"], [], ["c", "d"], ["odd"], ["piped"]]
    assert files[1].problems[0].startswith("b.yml[0].model_family")
    assert files[2].cards[1].source == "deep/c.jsonl[1]"
    assert files[0].cards[0].folder == folder


def test_json_lines_through_a_pipe() -> None:
    (file,) = collect(["-"], stdin=io.BytesIO(b'  {"name": "a"}\n{"name": "b"}\n'))
    assert [c.name for c in file.cards] == ["a", "b"]


def test_collect_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        collect([tmp_path / "nope.yaml"])
    with pytest.raises(FileNotFoundError, match="holds no card file"):
        collect([tmp_path])


def test_the_state_of_a_file_is_kept(tmp_path: Path, database: Database) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: a\n")
    import_files(database, collect([path]))
    stat = os.stat(path)
    assert rows(database, "SELECT size, mtime_ns FROM sources") == [(stat.st_size, stat.st_mtime_ns)]

    files = collect([path])
    path.write_text("name: a\nmore: 1\n")  # behind the reader's back
    import_files(database, files)
    assert rows(database, "SELECT size, mtime_ns FROM sources") == [(None, None)]


# --- checkpoints -----------------------------------------------------------------------------------------------------


URI = "hg://org/leaf"


def test_a_checkpoint_and_back(tmp_path: Path, database: Database) -> None:
    import_files(database, [card_file(CARDS)])
    manifest = make_manifest(50, 3)
    copies = make_copies(manifest, tmp_path / "copy", verified_at="2026-01-02T03:04:05Z")
    record_checkpoint(database, CheckpointContents(uri=URI, manifest=manifest, copies=copies, revision="abc"))

    stored = AssetStore(database).checkpoint(URI)
    assert stored is not None
    assert stored.manifest == manifest
    assert (stored.uri, stored.revision) == (URI, "abc")
    assert sorted(stored.copies, key=lambda c: c.file) == sorted(copies, key=lambda c: c.file)
    assert rows(database, "SELECT bytes, parameters, tensors, dtypes FROM checkpoints") == [
        (manifest.total_bytes, manifest.parameters, 50, "BF16,F32")
    ]
    assert rows(database, "SELECT sum(bytes), sum(parameters), count(*) FROM model_tensors WHERE model = 'leaf'") == [
        (manifest.total_bytes, manifest.parameters, 50)
    ]
    assert AssetStore(database).checkpoint("hg://other") is None
    assert AssetStore(database).checkpoint("file:///\udcff") is None
    assert_consistent(tmp_path)


def test_an_empty_manifest(database: Database) -> None:
    manifest = replace(make_manifest(0, 1, index_name=None), shards=())
    record_checkpoint(database, CheckpointContents(uri=URI, manifest=manifest))
    stored = AssetStore(database).checkpoint(URI)
    assert stored is not None
    assert stored.manifest == manifest


def test_a_later_manifest_replaces_the_first(tmp_path: Path, database: Database) -> None:
    import_files(database, [card_file(CARDS)])
    first, second = make_manifest(50, 3), make_manifest(20, 2)
    record_checkpoint(
        database, CheckpointContents(uri=URI, manifest=first, copies=make_copies(first, tmp_path), revision="1")
    )
    record_checkpoint(
        database, CheckpointContents(uri=URI, manifest=second, copies=make_copies(second, tmp_path), revision="2")
    )
    stored = AssetStore(database).checkpoint(URI)
    assert stored is not None
    assert stored.manifest == second
    assert {c.file for c in stored.copies} == {s.name for s in second.shards} | {second.index_name}
    assert rows(database, "SELECT count(*) FROM tensors") == [(20,)]
    assert rows(database, "SELECT revision FROM models WHERE name = 'leaf'") == [("2",)]
    assert_consistent(tmp_path)


def test_digests_stay_until_other_bytes_are_accepted(tmp_path: Path, database: Database) -> None:
    store, manifest = AssetStore(database), make_manifest(6, 2)
    copies = make_copies(manifest, tmp_path)
    changed = [*copies[:-1], replace(copies[-1], stat=FileStat(1, 2, 3, 4))]
    published = replace(manifest, shards=tuple(replace(shard, sha256="0" * 64) for shard in manifest.shards))

    def kept(
        manifest: Manifest,
        copies: Sequence[LocalCopy],
        revision: str = "",
        *,
        accept: bool = False,
        changes: bool = False,
    ) -> bool:
        """Whether recording this leaves the digests of tensors alone; they are known afterwards in any case.

        :param changes: the bytes turn out to be others.
        """
        record_checkpoint(
            database, CheckpointContents(uri=URI, manifest=manifest, copies=copies, revision=revision, accept=accept)
        )
        found = dict(store.tensor_digests(URI))
        with database.write() as connection:
            connection.exec_driver_sql("UPDATE tensors SET digest = 'd' || position WHERE position < 2")
            if not changes:
                connection.exec_driver_sql("UPDATE copies SET verified_at = 'then' WHERE verified_at IS NULL")
        assert found in ({}, store.tensor_digests(URI))
        return bool(found)

    assert not kept(manifest, copies)
    assert store.tensor_digests(URI) == {name: f"d{i}" for i, name in enumerate(manifest.names[:2])}
    assert kept(manifest, changed, changes=True)  # a load is to find out whether the bytes are others
    assert not kept(manifest, changed, accept=True)
    assert kept(manifest, changed, accept=True)
    assert kept(manifest, changed, accept=True)
    assert not kept(manifest, copies, accept=True)
    assert kept(manifest, copies, "1")  # the files are as they were, whatever they are called
    assert not kept(manifest, (), "2")
    assert kept(published, copies, "2")
    assert not kept(make_manifest(5, 2), copies, "2")
    assert store.tensor_digests("hg://other") == store.tensor_digests("file:///\udcff") == {}


def test_copies_of_other_machines_stay_as_long_as_the_files_do(tmp_path: Path, database: Database) -> None:
    manifest = make_manifest()
    record_checkpoint(database, CheckpointContents(uri=URI, manifest=manifest, copies=make_copies(manifest, tmp_path)))
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE copies SET place = 'another-machine'")
    store = AssetStore(database)

    def here() -> tuple[LocalCopy, ...]:
        stored = store.checkpoint(URI)
        assert stored is not None
        return stored.copies

    assert here() == ()
    copies = make_copies(manifest, tmp_path / "here")
    record_checkpoint(database, CheckpointContents(uri=URI, manifest=manifest, copies=copies))
    assert {c.path for c in here()} == {c.path for c in copies}
    assert rows(database, "SELECT count(*) FROM copies") == [(2 * len(copies),)]

    record_checkpoint(database, CheckpointContents(uri=URI, manifest=make_manifest(6, 3)))
    assert rows(database, "SELECT count(*) FROM copies") == [(0,)]


def test_what_was_brought_stays_known_when_a_checkpoint_moves_on(tmp_path: Path, database: Database) -> None:
    """By the paths, in the cache of the hub's client alone; what is lading's own or somebody else's is forgotten."""
    manifest, store = make_manifest(index_name=None), AssetStore(database)
    kinds: tuple[CopyKind, ...] = ("hub", "hub", "cache", "adopted", "source")

    def copies(commit: str) -> list[LocalCopy]:
        made = make_copies(manifest, tmp_path / commit)
        return [replace(copy, kind=kinds[i % len(kinds)]) for i, copy in enumerate(made)]

    def beside(commit: str, kind: CopyKind) -> LocalCopy:
        path = tmp_path / commit / "config.json"
        return LocalCopy(file=str(path), path=path, stat=FileStat(1, 2, 3, 4), kind=kind)

    def here() -> set[tuple[str, Path]]:
        stored = store.checkpoint(URI)
        assert stored is not None
        return {(copy.file, copy.path) for copy in stored.copies}

    def as_known(copies: list[LocalCopy]) -> set[tuple[str, Path]]:
        return {(copy.file, copy.path) for copy in copies}

    def left(copies: list[LocalCopy]) -> set[tuple[str, Path]]:
        return {(str(copy.path), copy.path) for copy in copies if copy.kind == "hub"}

    one, two, along = copies("one"), copies("two"), [beside("one", "hub"), beside("two", "adopted")]
    record_companions(database, uri=URI, copies=along)
    record_checkpoint(database, CheckpointContents(uri=URI, manifest=manifest, copies=one))
    assert here() == as_known(one), "nothing comes along with what is not known"
    record_companions(database, uri=URI, copies=along)
    assert here() == as_known([*one, *along])

    record_files(database, uri=URI, copies=two)
    assert here() == as_known([*two, *along]) | left(one)
    record_files(database, uri=URI, copies=one)
    assert here() == as_known([*one, *along]) | left(two)
    record_checkpoint(database, CheckpointContents(uri=URI, manifest=manifest, copies=two))
    assert here() == as_known([*two, *along]) | left(one)
    record_checkpoint(database, CheckpointContents(uri=URI, manifest=make_manifest(6, 3)))
    assert here() == as_known(along) | left([*one, *two])


def test_inodes_of_64_bits(tmp_path: Path, database: Database) -> None:
    manifest = make_manifest(2, 1, index_name=None)
    copy = LocalCopy(file=manifest.shards[0].name, path=tmp_path / "x", stat=FileStat(1, -2, 3, 2**64 - 5))
    record_checkpoint(database, CheckpointContents(uri=URI, manifest=manifest, copies=[copy]))
    stored = AssetStore(database).checkpoint(URI)
    assert stored is not None
    assert stored.copies == (copy,)


def test_links(tmp_path: Path, database: Database) -> None:
    import_files(database, [card_file(CARDS + "---\nname: twin\nbase: leaf\n---\nname: other\nbase: base\n")])
    manifest = make_manifest()

    def linked() -> list[tuple[object, ...]]:
        return rows(database, "SELECT name, format FROM assets WHERE format IS NOT NULL ORDER BY 1")

    # By the card's own URI, which another card has, too.
    record_checkpoint(database, CheckpointContents(uri=URI, manifest=manifest))
    assert linked() == [("leaf", "safetensors"), ("twin", "safetensors")]

    # By name: what an overlay or a fetch made of it.
    record_checkpoint(database, CheckpointContents(uri="file:///data/o", manifest=manifest), cards=["other@user"])
    assert [name for name, _ in linked()] == ["leaf", "other", "twin"]
    record_checkpoint(database, CheckpointContents(uri="file:///data/nothing", manifest=manifest), cards=["nobody"])

    # A card that names another checkpoint is not linked to the old one any longer, nor are those based on it.
    cards = (
        CARDS.replace("hg://org/leaf", "hg://org/new") + "---\nname: twin\nbase: leaf\n---\nname: other\nbase: base\n"
    )
    import_files(database, [card_file(cards)])
    assert [name for name, _ in linked()] == ["other"]

    # One that comes later finds what is known.
    import_files(database, [card_file(f"name: late\ncheckpoint: {URI}\n", "file:///c/late.yaml")])
    assert [name for name, _ in linked()] == ["late", "other"]
    assert_consistent(tmp_path)


def test_a_change_elsewhere_in_a_card_keeps_its_link(database: Database) -> None:
    import_files(database, [card_file(CARDS)])
    record_checkpoint(database, CheckpointContents(uri="file:///fetched", manifest=make_manifest()), cards=["leaf"])
    import_files(database, [card_file(CARDS.replace("mit", "bsd"))])
    assert rows(database, "SELECT license, format FROM models WHERE name = 'leaf'") == [("bsd", "safetensors")]


def test_a_verification(tmp_path: Path, database: Database) -> None:
    manifest = make_manifest(4, 1, index_name=None)
    (copy,) = make_copies(manifest, tmp_path)
    record_checkpoint(database, CheckpointContents(uri=URI, manifest=manifest, copies=[copy]))

    def verify(found: str, stat: FileStat = copy.stat) -> str | None:
        check = Check(file=copy.file, path=copy.path, stat=stat, method="sha256", expected="aa", found=found)
        record_files(database, uri=URI, checks=[check])
        stored = AssetStore(database).checkpoint(URI)
        assert stored is not None
        return stored.copies[0].verified_at

    assert verify("aa", replace_size(copy.stat)) is None  # of a file in another state
    assert verify("aa") is not None
    assert verify("bb") is None
    assert rows(database, "SELECT result, expected, found FROM verifications ORDER BY id") == [
        ("match", "aa", "aa"), ("match", "aa", "aa"), ("mismatch", "aa", "bb"),
    ]  # fmt: skip


def replace_size(stat: FileStat) -> FileStat:
    return FileStat(stat.size + 1, stat.mtime_ns, stat.ctime_ns, stat.inode)


def test_entries_without_files(database: Database) -> None:
    """What a program makes, rather than a file."""
    file = CardFile(
        source="stdin",
        sha256="",
        cards=(CardEntry(name="a", metadata={"model_family": "f"}), CardEntry(name="b", metadata={"base": "a"})),
        architectures=(ArchitectureEntry(name="x", family="f", config={"deep": {"list": [1, 2.5, None, True]}}),),
        problems=(),
    )
    assert import_files(database, [file]).added == ("a", "b", "f/x (architecture)")
    assert rows(database, "SELECT name, position FROM cards ORDER BY name") == [("a", 0), ("b", 1)]
    assert AssetStore(database).architecture("x", "f").overrides == ({"deep": {"list": [1, 2.5, None, True]}},)
