"""Models taken off the machine, whatever comes in between; and what is left is counted."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import huggingface_hub  # noqa: F401  # a user who may do nothing cannot import it either
import pytest
from click.testing import Result

import lading
from lading.catalog.checkpoints.record import record_checkpoint
from lading.catalog.database import migrate as lifecycle
from lading.catalog.open import open_catalog
from lading.catalog.records import CheckpointContents, LocalCopy
from lading.errors import AssetNotFoundError, CatalogError, PolicyError
from lading.formats import index
from lading.sources.cache import Cache, CachedFile
from lading.sources.hub.cache import blob_tag
from lading.system.filesystem import FileStat, location_id
from lading.system.settings import Settings
from tests.helpers.cache_tools import size_of
from tests.helpers.cached_repository import add_cards, add_snapshot, tree, use_cache
from tests.helpers.catalog_tools import nobody, public_folder
from tests.helpers.make_checkpoint import make

Run = Callable[..., subprocess.CompletedProcess[str]]

HTTP = "https://example.com/a/model.safetensors"
OTHER = "https://example.com/b/model.safetensors"


@pytest.fixture(autouse=True)
def _offline(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LADING_OFFLINE", "1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_cache(tmp_path / "hub", monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make(folder / "tiny")
    make(folder / "sharded", shards=3)
    return folder


def own_cache() -> Cache:
    settings = Settings.from_environment()
    return Cache(settings.cache_dir, catalog=settings.catalog_id)


def fetched_by_http(uri: str, file: Path, *, in_catalog: bool = True) -> Path:
    """A file in lading's cache, as a fetch leaves it; returns where it is."""
    data = file.read_bytes()
    sha256, cache = hashlib.sha256(data).hexdigest(), own_cache()
    part = cache.tmp / "part"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(data)
    with part.open("rb") as opened:
        blob = cache.put(opened.fileno(), part, sha256, "model.safetensors")
    stat = FileStat.from_stat(blob.stat())
    known = CachedFile(sha256=sha256, size=len(data), etag=None, published=False, stat=stat, fetched_at=0.0)
    cache.add(uri, {"model.safetensors": known})
    if in_catalog:
        copy = LocalCopy(file="model.safetensors", path=blob, stat=stat, kind="cache", verified_at="2026-01-01")
        record(uri, file, [copy])
    return blob


def fetched_from_hub(uri: str, snapshot: Path) -> None:
    """A snapshot whose checkpoint lading fetched."""
    manifest = index(snapshot)
    copies = [
        LocalCopy(
            file=shard.name,
            path=snapshot / shard.name,
            stat=FileStat.from_stat((snapshot / shard.name).stat()),
            kind="hub",
        )
        for shard in manifest.shards
    ]
    record(uri, snapshot, copies, revision=snapshot.name)


def record(uri: str, path: Path, copies: list[LocalCopy], *, revision: str = "") -> None:
    database = lading.get_asset_store().database
    record_checkpoint(database, CheckpointContents(uri=uri, manifest=index(path), copies=copies, revision=revision))


def known(uri: str) -> int:
    stored = lading.get_asset_store().checkpoint(uri)
    assert stored is not None, "what it holds stays known"
    return len(stored.copies)


# --- lading's own cache ----------------------------------------------------------------------------------------------


def test_what_was_fetched_is_removed(tmp_path: Path, made: Path) -> None:
    add_cards(tmp_path, tiny=HTTP, child=HTTP)
    blob = fetched_by_http(HTTP, made / "tiny" / "model.safetensors")
    size = blob.stat().st_size

    removal = lading.remove_model("tiny", dry_run=True)
    assert (removal.freed, removal.removed, removal.also_of) == (size, (blob,), ("child",))
    assert blob.exists()
    assert known(HTTP) == 1

    assert lading.remove_model("tiny") == removal
    assert not blob.exists()
    assert size_of(own_cache()) == 0
    assert list(own_cache().entries()) == []
    assert known(HTTP) == 0
    assert lading.get_asset_store().models("tiny")[0].status == "remote"
    assert lading.remove_model("tiny").nothing


def test_a_file_that_others_need_stays(tmp_path: Path, hub: Path, made: Path) -> None:
    add_cards(tmp_path, tiny=HTTP, other=OTHER, third="hg://Qwen/Tiny")
    file = made / "tiny" / "model.safetensors"
    blob = fetched_by_http(HTTP, file)
    assert fetched_by_http(OTHER, file) == blob

    removal = lading.remove_model("tiny")
    assert (removal.freed, removal.removed) == (0, ())
    assert [each.path for each in removal.kept] == [blob]
    assert (known(HTTP), known(OTHER)) == (0, 1)
    assert own_cache().entry(HTTP) is None
    assert own_cache().entry(OTHER) is not None

    # A checkpoint of the hub whose bytes were here before: only the catalog knows that it needs them.
    copy = LocalCopy(file=file.name, path=blob, stat=FileStat.from_stat(blob.stat()), kind="cache")
    record("hg://Qwen/Tiny", file, [copy], revision="a" * 40)
    assert lading.remove_model("other").freed == 0
    assert blob.exists()
    assert lading.remove_model("third").freed > 0
    assert not blob.exists()


def test_what_the_catalog_does_not_know_is_found_by_its_entry(tmp_path: Path, made: Path) -> None:
    add_cards(tmp_path, tiny=HTTP)
    blob = fetched_by_http(HTTP, made / "tiny" / "model.safetensors", in_catalog=False)

    assert lading.remove_model("tiny").removed == (blob,)
    assert not blob.exists()


def test_files_of_other_programs_are_not_removed(tmp_path: Path, hub: Path, made: Path) -> None:
    shutil.copytree(made, tmp_path / "models")
    add_snapshot(hub, "Qwen/Tiny", made / "tiny")
    add_cards(tmp_path, tiny="hg://Qwen/Tiny", own=str(tmp_path / "models" / "tiny"))
    lading.adopt_checkpoints()
    lading.adopt_checkpoints(tmp_path / "models")
    before = tree(hub), tree(tmp_path / "models")

    with pytest.raises(PolicyError, match="--yes"):
        lading.remove_model("tiny")
    assert known("hg://Qwen/Tiny") == 1
    for name, path in (
        ("own", tmp_path / "models" / "tiny" / "model.safetensors"),
        (f"file://{tmp_path}/models/sharded", None),
    ):
        removal = lading.remove_model(name)
        assert (removal.freed, removal.removed) == (0, ())
        assert path is None or [each.path for each in removal.kept] == [path]
        assert removal.kept

    assert (tree(hub), tree(tmp_path / "models")) == before


def test_a_path_that_is_in_no_cache_is_never_removed(tmp_path: Path, hub: Path, made: Path) -> None:
    folder = shutil.copytree(made / "tiny", tmp_path / "models")
    add_cards(tmp_path, tiny="hg://Qwen/Tiny", http=HTTP)
    stat = FileStat.from_stat((folder / "model.safetensors").stat())
    for uri, kind in (("hg://Qwen/Tiny", "hub"), (HTTP, "cache")):
        copy = LocalCopy(file="model.safetensors", path=folder / "model.safetensors", stat=stat, kind=kind)  # type: ignore[arg-type]
        record(uri, folder, [copy])

    lading.remove_model("tiny")
    removal = lading.remove_model("http")

    assert "LADING_CACHE_DIR" in removal.kept[0].reason
    assert (folder / "model.safetensors").exists()


def test_what_was_in_another_cache_that_is_gone(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_cards(tmp_path, tiny=HTTP)
    monkeypatch.setenv("LADING_CACHE_DIR", str(tmp_path / "other"))
    fetched_by_http(HTTP, made / "tiny" / "model.safetensors")
    monkeypatch.delenv("LADING_CACHE_DIR")
    shutil.rmtree(tmp_path / "other")

    assert lading.remove_model("tiny").nothing
    assert known(HTTP) == 0


# --- the cache of Hugging Face's libraries ---------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["hub", "adopted"])
def test_a_revision_is_deleted_whoever_fetched_it(tmp_path: Path, hub: Path, made: Path, kind: str) -> None:
    add_cards(tmp_path, tiny="hg://Qwen/Tiny")
    snapshot = add_snapshot(hub, "Qwen/Tiny", made / "sharded")
    other = add_snapshot(hub, "Qwen/Other", made / "tiny", commit=snapshot.name)
    if kind == "hub":
        fetched_from_hub("hg://Qwen/Tiny", snapshot)
    else:
        lading.adopt_checkpoints()
    size = sum(path.stat().st_size for path in snapshot.iterdir())
    untouched = tree(hub)

    removal = lading.remove_model("tiny", dry_run=True)
    assert [(each.repo, each.commit, each.path) for each in removal.revisions] == [
        ("Qwen/Tiny", snapshot.name, snapshot)
    ]
    assert removal.freed == size
    assert tree(hub) == untouched
    assert lading.remove_model("tiny", hub=True) == removal
    assert list(hub.iterdir()) == [other.parents[1]], "commits of two repositories may have one name"
    assert known("hg://Qwen/Tiny") == 0
    assert lading.remove_model("tiny", hub=True).nothing


def test_a_blob_of_two_snapshots_stays(tmp_path: Path, hub: Path, made: Path) -> None:
    add_cards(tmp_path, tiny="hg://Qwen/Tiny@v1")
    weights = (made / "tiny" / "model.safetensors").read_bytes()
    old = add_snapshot(hub, "Qwen/Tiny", {"model.safetensors": weights}, ref="v1")
    new = add_snapshot(hub, "Qwen/Tiny", {"model.safetensors": weights, "more.txt": b"more"})
    fetched_from_hub("hg://Qwen/Tiny@v1", old)

    removal = lading.remove_model("tiny", hub=True)

    assert (removal.freed, removal.removed) == (0, (old / "model.safetensors",))
    assert not old.exists()
    assert not (hub / "models--Qwen--Tiny" / "refs" / "v1").exists()
    assert (hub / "models--Qwen--Tiny" / "refs" / "main").read_text() == new.name
    assert (new / "model.safetensors").read_bytes() == weights


def test_the_same_snapshot_by_two_uris(tmp_path: Path, hub: Path, made: Path) -> None:
    add_cards(tmp_path, tiny="hg://Qwen/Tiny", other="hf://qwen/tiny")
    snapshot = add_snapshot(hub, "Qwen/Tiny", made / "tiny")
    for uri in ("hg://Qwen/Tiny", "hf://qwen/tiny"):
        fetched_from_hub(uri, snapshot)

    removal = lading.remove_model("tiny")
    assert (removal.freed, removal.removed, removal.revisions) == (0, (), ())
    assert "hf://qwen/tiny" in removal.kept[0].reason
    assert (snapshot / "model.safetensors").exists()

    assert lading.remove_model("other", hub=True).freed > 0
    assert not (snapshot / "model.safetensors").exists()


def test_bytes_of_another_source_are_no_reason_to_delete_a_revision(tmp_path: Path, hub: Path, made: Path) -> None:
    add_cards(tmp_path, http=HTTP)
    path = add_snapshot(hub, "Qwen/Tiny", made / "tiny") / "model.safetensors"
    stat = FileStat.from_stat(path.stat())
    record(HTTP, path, [LocalCopy(file=path.name, path=path, stat=stat, kind="adopted", verified_at="2026-01-01")])

    removal = lading.remove_model("http")
    assert ([each.path for each in removal.kept], removal.revisions) == ([path], ())
    assert path.exists()


@pytest.mark.parametrize("others", [True, False])
def test_a_cache_without_links(tmp_path: Path, hub: Path, made: Path, others: bool) -> None:
    add_cards(tmp_path, tiny="hg://Qwen/Tiny")
    snapshot = add_snapshot(hub, "Qwen/Tiny", made / "tiny")
    if others:
        add_snapshot(hub, "Qwen/Tiny", {"more.txt": b"more"}, ref="v1")
    link = snapshot / "model.safetensors"
    blob = link.resolve()
    link.unlink()
    blob.rename(link)
    fetched_from_hub("hg://Qwen/Tiny", snapshot)

    assert lading.remove_model("tiny", hub=True).freed > 0
    assert not snapshot.exists()


@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_nothing_outside_of_the_repository_is_removed(
    tmp_path: Path, hub: Path, made: Path, what: str, others: bool
) -> None:
    victim = shutil.copytree(made / "tiny", tmp_path / "victim")
    before = tree(victim)
    add_cards(tmp_path, tiny="hg://Qwen/Tiny")
    snapshot = add_snapshot(hub, "Qwen/Tiny", made / "tiny")
    if others:
        add_snapshot(hub, "Qwen/Tiny", {"more.txt": b"more"}, ref="v1")
    fetched_from_hub("hg://Qwen/Tiny", snapshot)
    if what == "file":
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").symlink_to(victim / "model.safetensors")
    else:
        shutil.rmtree(snapshot)
        snapshot.symlink_to(victim)

    with suppress(OSError):
        lading.remove_model("tiny", hub=True)

    assert tree(victim) == before


def test_a_repository_that_huggingface_hub_finds_damaged(tmp_path: Path, hub: Path, made: Path) -> None:
    add_cards(tmp_path, tiny="hg://Qwen/Tiny")
    snapshot = add_snapshot(hub, "Qwen/Tiny", made / "tiny")
    fetched_from_hub("hg://Qwen/Tiny", snapshot)
    (snapshot / "gone.txt").symlink_to("../../blobs/gone")

    with pytest.raises(OSError, match="huggingface_hub does not find"):
        lading.remove_model("tiny", hub=True)
    assert known("hg://Qwen/Tiny") == 1


# --- whatever comes in between ---------------------------------------------------------------------------------------

CHILD = """\
import os, signal, sys
import lading

left = int(sys.argv[2])

def deadly(call):
    def wrapped(*args, **kwargs):
        global left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return call(*args, **kwargs)
    return wrapped

lading.get_asset_store()
for name in ("unlink", "rmdir", "rename", "fsync"):
    setattr(os, name, deadly(getattr(os, name)))
lading.remove_model(sys.argv[1])
"""


def _killed_at_each_step(process: Run, name: str, prepare: Callable[[], None]) -> Iterator[None]:
    """Remove a model in processes that die at their first, second … change of the file system."""
    for step in range(40):
        prepare()
        done = process("-c", CHILD, name, str(step))
        assert done.returncode in (0, -9), done.stderr
        yield
        if done.returncode == 0:
            assert step > 1
            return
    raise AssertionError("the removal has no end")


@pytest.mark.slow
def test_a_removal_from_the_cache_that_is_killed(process: Run, tmp_path: Path, hub: Path, made: Path) -> None:
    add_cards(tmp_path, tiny=HTTP)

    def prepare() -> None:
        fetched_by_http(HTTP, made / "tiny" / "model.safetensors")

    for _ in _killed_at_each_step(process, "tiny", prepare):
        assert known(HTTP) == 0 or not usable("tiny") or size_of(own_cache()) > 0

        lading.remove_model("tiny")
        assert (known(HTTP), size_of(own_cache()), list(own_cache().entries())) == (0, 0, [])


def usable(name: str) -> bool:
    """Whether a load would find the model on this machine."""
    from lading.checkpoints.locate import card_checkpoint

    store = lading.get_asset_store()
    return card_checkpoint(store.retrieve_card(name), store).files is not None


def test_a_cache_and_a_catalog_that_cannot_be_written(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with public_folder() as folder:
        monkeypatch.setenv("LADING_CACHE_DIR", str(folder / "cache"))
        monkeypatch.setenv("LADING_DATABASE_URL", f"sqlite:///{folder / 'catalog.sqlite'}")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        hub = use_cache(folder / "hub", monkeypatch)
        add_cards(folder, tiny=HTTP, hubbed="hg://Qwen/Tiny")
        blob = fetched_by_http(HTTP, made / "tiny" / "model.safetensors")
        snapshot = add_snapshot(hub, "Qwen/Tiny", made / "tiny")
        fetched_from_hub("hg://Qwen/Tiny", snapshot)
        os.chmod(folder / "catalog.sqlite", 0o666)
        os.chmod(folder, 0o777)  # for the files beside the database
        with nobody():
            for name in ("tiny", "hubbed"):
                with pytest.raises(PermissionError):
                    lading.remove_model(name, hub=True)
                assert not lading.remove_model(name, dry_run=True).nothing
        assert (known(HTTP), known("hg://Qwen/Tiny")) == (1, 1)
        assert usable("tiny")
        assert usable("hubbed")

        os.chmod(folder, 0o755)
        os.chmod(folder / "catalog.sqlite", 0o644)
        with nobody():
            store = lading.AssetStore(open_catalog(Settings.from_environment()))
            assert not store.database.writable
            for call in (
                lambda: lading.remove_model("tiny", store=store),
                lambda: lading.remove_orphans(store=store),
                lambda: lading.adopt_checkpoints(store=store),
            ):
                with pytest.raises(CatalogError, match="cannot be written"):
                    call()
            assert lading.disk_usage(store=store).bytes > 0
        assert blob.exists()
        assert (snapshot / "model.safetensors").exists()


def test_unknown_names() -> None:
    for name in ("nobody", "file:///nowhere", "hg://no/body"):
        with pytest.raises(AssetNotFoundError):
            lading.remove_model(name)
    assert lading.remove_model("llama3_8b").nothing, "a gated model has no checkpoint at all"


# --- what is there ---------------------------------------------------------------------------------------------------


def test_usage_counts_each_byte_once(tmp_path: Path, hub: Path, made: Path) -> None:
    add_cards(
        tmp_path, a=HTTP, b=OTHER, c=OTHER, hubbed="hg://Qwen/Tiny", own=str(made / "sharded"), gone="hg://no/one"
    )
    file = made / "tiny" / "model.safetensors"
    blob = fetched_by_http(HTTP, file)
    fetched_by_http(OTHER, file)
    snapshot = add_snapshot(hub, "Qwen/Tiny", made / "tiny")
    lading.adopt_checkpoints()
    lading.index_checkpoint("own")
    size = file.stat().st_size
    own = sum(p.stat().st_size for p in (made / "sharded").iterdir() if p.name != "config.json")

    usage = lading.disk_usage()

    assert {h.name: (h.kind, h.bytes, h.files, h.verified, h.path) for h in usage.holdings} == {
        "a": ("cache", size, 1, True, str(blob)),
        "b": ("cache", size, 1, True, str(blob)),
        "c": ("cache", size, 1, True, str(blob)),
        "hubbed": ("adopted", size, 1, False, str(snapshot / "model.safetensors")),
        "own": ("source", own, 4, False, str(made / "sharded")),
    }
    assert usage.bytes == 2 * size + own
    assert usage.orphans == ()
    assert [h.name for h in lading.disk_usage("[ab]").holdings] == ["a", "b"]
    assert lading.disk_usage("[ab]").bytes == size

    (snapshot / "model.safetensors").resolve().unlink()
    assert "hubbed" not in {h.name for h in lading.disk_usage().holdings}


def test_a_file_that_changed_is_not_verified(tmp_path: Path, made: Path) -> None:
    add_cards(tmp_path, a=HTTP)
    blob = fetched_by_http(HTTP, made / "tiny" / "model.safetensors")
    assert lading.disk_usage().holdings[0].verified

    os.utime(blob, ns=(1, 1))

    (holding,) = lading.disk_usage().holdings
    assert (holding.verified, holding.complete) == (False, False)


def test_orphans(tmp_path: Path, hub: Path, made: Path) -> None:
    add_cards(tmp_path, tiny=HTTP)
    needed = fetched_by_http(HTTP, made / "tiny" / "model.safetensors")
    shared = fetched_by_http("https://example.com/gone", made / "tiny" / "model.safetensors")
    lost = fetched_by_http("https://example.com/lost", made / "sharded" / "model-00001-of-00003.safetensors")
    stray = fetched_by_http(
        "https://example.com/stray", made / "sharded" / "model-00002-of-00003.safetensors", in_catalog=False
    )
    next(p for p in (own_cache().folder / "entries").iterdir() if "stray" in p.read_text()).unlink()
    assert needed == shared

    usage = lading.disk_usage()

    assert [(h.name, h.bytes, h.files) for h in usage.orphans] == [
        ("https://example.com/gone", 0, 0),
        ("https://example.com/lost", lost.stat().st_size, 1),
        (str(stray), stray.stat().st_size, 1),
    ]
    assert usage.orphan_bytes == lost.stat().st_size + stray.stat().st_size

    removal = lading.remove_orphans(dry_run=True, older_than=0)
    assert set(removal.removed) == {lost, stray}
    assert lading.remove_orphans().removed == (lost,), "one that has just come may be about to get its entry"
    lading.remove_orphans(older_than=0)
    assert own_cache().files() == [needed]
    assert [entry.uri for entry in own_cache().entries()] == [HTTP]
    assert lading.disk_usage().orphans == ()
    assert blob_tag(needed) is None


@pytest.mark.slow
def test_sidecars_of_an_older_version_are_orphans(tmp_path: Path, made: Path) -> None:
    add_cards(tmp_path, tiny=HTTP)
    blob = fetched_by_http(HTTP, made / "tiny" / "model.safetensors")
    settings = Settings.from_environment()
    # What `lading repack tiny --tp 2` left: a file, and a checkpoint of that file.
    lifecycle.downgrade(settings, "3")
    sidecar = own_cache().folder / "repacked" / f"{'cd' * 32}.safetensors"
    sidecar.parent.mkdir()
    shutil.copy(made / "sharded" / "model-00001-of-00003.safetensors", sidecar)
    rows = SIDECAR.format(uri=f"repack+tp=2:{HTTP}", path=sidecar, place=location_id(sidecar.parent))
    with closing(sqlite3.connect(settings.database_url.removeprefix("sqlite:///"))) as connection, connection:
        connection.executescript(rows)
    before = counts()

    lifecycle.upgrade(settings)

    assert counts() == {table: n if table == "verifications" else n - 1 for table, n in before.items()}
    assert {held.name for held in lading.disk_usage().holdings} == {"tiny"}
    assert [(orphan.path, orphan.bytes) for orphan in lading.disk_usage().orphans] == [
        (str(sidecar), sidecar.stat().st_size)
    ]
    assert lading.remove_orphans(older_than=-1).removed == (sidecar,)
    assert lading.disk_usage().orphans == ()
    assert known(HTTP) == 1
    assert blob.exists()


SIDECAR = """
INSERT INTO checkpoints (id, uri, format, bytes, parameters, dtypes, tensors, metadata, indexed_at, version)
    VALUES (99, '{uri}', 'safetensors', 8, 4, 'BF16', 1, '{{}}', '2026-01-01', '0.1');
INSERT INTO shards (checkpoint_id, position, name, size) VALUES (99, 0, 'x.safetensors', 88);
INSERT INTO tensors (checkpoint_id, position, shard, name, dtype, shape, parameters, bytes, "offset")
    VALUES (99, 0, 0, 'down_proj.weight.0', 'BF16', '[2, 2]', 4, 8, 80);
INSERT INTO digests (checkpoint_id, position, dim, blocks) VALUES (99, 0, 0, x'00');
INSERT INTO copies (checkpoint_id, file, place, path, size, mtime_ns, ctime_ns, inode, recorded_at, kind)
    VALUES (99, 'x.safetensors', '{place}', '{path}', 88, 1, 1, 1, '2026-01-01', 'cache');
INSERT INTO verifications (uri, file, path, method, result, version, at)
    VALUES ('{uri}', 'x.safetensors', '{path}', 'blake3', 'match', '0.1', '2026-01-01');
"""


def counts() -> dict[str, int]:
    tables = ("checkpoints", "shards", "tensors", "digests", "copies", "verifications")
    with closing(sqlite3.connect(Settings.from_environment().database_url.removeprefix("sqlite:///"))) as connection:
        return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}


# --- a cache that several catalogs share -----------------------------------------------------------------------------


def use_catalog(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("LADING_DATABASE_URL", f"sqlite:///{folder / 'catalog.sqlite'}")


@pytest.mark.slow
def test_what_another_catalog_brought_stays(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made / "tiny" / "model.safetensors"
    use_catalog(tmp_path / "a", monkeypatch)
    add_cards(tmp_path / "a", tiny=HTTP)
    blob = fetched_by_http(HTTP, file)
    made_of_it = own_cache().folder / "repacked" / f"{'ab' * 32}.safetensors"
    made_of_it.parent.mkdir()
    made_of_it.write_bytes(b"x")

    use_catalog(tmp_path / "b", monkeypatch)
    add_cards(tmp_path / "b", other=OTHER)
    assert lading.disk_usage().orphans == ()
    assert lading.remove_orphans(older_than=-1).removed == ()

    # The second one uses the file, and lets go of it.
    fetched_by_http(HTTP, file)
    assert [h.bytes for h in lading.disk_usage().orphans] == [0], "it gives back an entry, and no bytes"
    lading.remove_orphans(older_than=-1)
    assert lading.disk_usage().orphans == ()
    fetched_by_http(OTHER, file)
    removal = lading.remove_model("other")
    assert (removal.freed, [each.path for each in removal.kept]) == (0, [blob])
    assert blob.exists()
    assert made_of_it.exists()

    use_catalog(tmp_path / "a", monkeypatch)
    assert lading.remove_model("tiny").removed == (blob,)
    assert not blob.exists()


def test_what_a_card_names_in_another_environment_stays(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = tmp_path / "own.yaml"
    card.write_text(f"name: own\ncheckpoint: {HTTP}\n---\nname: own@cluster\ncheckpoint: {OTHER}\n")
    lading.import_cards(card)
    blobs = {
        fetched_by_http(uri, made / name)
        for uri, name in ((HTTP, "tiny/model.safetensors"), (OTHER, "sharded/model-00001-of-00003.safetensors"))
    }

    for env in ("cluster", "user", ""):
        monkeypatch.setenv("LADING_ENV", env)
        assert lading.disk_usage().orphans == ()
        assert lading.remove_orphans(older_than=-1).removed == ()
        assert all(blob.exists() for blob in blobs)


@pytest.mark.slow
def test_a_new_catalog_in_the_place_of_a_lost_one(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_catalog(tmp_path / "a", monkeypatch)
    add_cards(tmp_path, tiny=HTTP)
    blob = fetched_by_http(HTTP, made / "tiny" / "model.safetensors")
    stray = fetched_by_http(OTHER, made / "sharded" / "model-00001-of-00003.safetensors", in_catalog=False)
    for path in (tmp_path / "a").iterdir():
        path.unlink()

    assert lading.get_asset_store().maybe_retrieve_card("tiny") is None
    assert lading.disk_usage().orphans == ()
    assert lading.remove_orphans(older_than=-1).removed == ()
    assert blob.exists()
    assert stray.exists()


@pytest.mark.parametrize("damage", ["{", '{"uri": 1}', '{"uri": "\\ud800", "whole": false, "files": {}}', "[" * 9999])
def test_a_damaged_entry_stops_nothing(tmp_path: Path, made: Path, damage: str) -> None:
    add_cards(tmp_path, tiny=HTTP)
    blob = fetched_by_http(HTTP, made / "tiny" / "model.safetensors")
    lost = fetched_by_http(OTHER, made / "sharded" / "model-00001-of-00003.safetensors")
    stray = fetched_by_http(
        "https://example.com/x", made / "sharded" / "model-00002-of-00003.safetensors", in_catalog=False
    )
    (entry,) = (p for p in (own_cache().folder / "entries").iterdir() if "example.com/x" in p.read_text())
    entry.write_text(damage)

    usage = lading.disk_usage()
    assert [h.name for h in usage.holdings] == [OTHER, "tiny"]
    assert [h.name for h in usage.orphans] == [OTHER]
    assert lading.remove_orphans(older_than=-1).removed == (lost,)
    assert lading.remove_model("tiny").removed == (blob,)
    assert stray.exists(), "whose it is, only its entry says"


# --- addresses with secrets ------------------------------------------------------------------------------------------


def test_the_secret_of_an_address_is_shown_by_no_command(
    tmp_path: Path, made: Path, cli: Callable[..., Result], caplog: pytest.LogCaptureFixture
) -> None:
    signed = f"{HTTP}?token=Secret-1#Secret-2"
    add_cards(tmp_path, tiny=f'"{signed}"')
    out = ""
    for words in (["path", "tiny"], ["verify", "tiny"], ["pull", "tiny"], ["load", "tiny"]):
        code = 5 if words[0] in ("pull", "load") else 2
        out += cli(*words, code=code).output
    out += cli("show", "tiny").output
    fetched_by_http(signed, made / "tiny" / "model.safetensors")
    for words in (["path", "tiny"], ["verify", "tiny"], ["du", "--json"], ["rm", "tiny", "--dry-run"]):
        out += cli(*words).output
    add_cards(tmp_path, tiny=OTHER)
    for words in (["du"], ["du", "--json"], ["du", "--orphans", "--json"]):
        out += cli(*words).output
    assert f"{HTTP}: 1 file to be removed" in cli("rm", HTTP, "--dry-run").output
    assert HTTP in out
    assert "Secret" not in out + caplog.text
    kept = [path for path in own_cache().folder.rglob("*") if path.is_file() and b"Secret" in path.read_bytes()]
    assert kept == []
