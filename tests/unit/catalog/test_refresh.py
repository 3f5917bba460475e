"""What a catalog takes up when it is opened: the package's cards, the user's, and registered families."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from lading.catalog.check import check_catalog
from lading.catalog.import_cards import collect, import_files
from lading.catalog.importing import refresh
from lading.catalog.importing import write as rows
from lading.catalog.open import open_catalog
from lading.catalog.query import run_query as query
from lading.catalog.store import AssetStore
from lading.errors import CardFileError
from lading.system.settings import Settings
from tests.helpers.catalog_tools import card_file, settings_in

pytestmark = pytest.mark.usefixtures("any_database")

Write = Callable[[str, str], Path]


@pytest.fixture
def seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a card file of the package."""
    folder = tmp_path / "seeds"
    folder.mkdir()
    monkeypatch.setattr(refresh, "files", lambda package: folder)

    def write(name: str, text: str) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return write


@pytest.fixture
def mine(tmp_path: Path, seed: Write) -> Write:
    """Writes a card file of the user."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / "cards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def settings(tmp_path: Path, seed: Write) -> Settings:
    return settings_in(tmp_path, card_paths=(tmp_path / "cards",))


def cards(settings: Settings) -> dict[object, object]:
    """Names and content of all cards after the catalog was opened again."""
    return dict(query(open_catalog(settings), "SELECT name, metadata FROM cards").rows)  # type: ignore[arg-type]


def set_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    for module in (refresh, rows):
        monkeypatch.setattr(module, "__version__", version)


# --- the package's cards ---------------------------------------------------------------------------------------------


def test_new_seeds_come_with_a_new_package(seed: Write, settings: Settings) -> None:
    seed("a.yaml", "name: a\nv: 1\n---\nname: gone\n")
    assert cards(settings) == {"a": '{"v":1}', "gone": "{}"}
    seed("a.yaml", "name: a\nv: 2\n")
    seed("b.yaml", "name: b\n")
    assert cards(settings) == {"a": '{"v":2}', "b": "{}"}
    seed("b.yaml", "name: b\n").unlink()
    assert cards(settings) == {"a": '{"v":2}'}
    assert query(open_catalog(settings), "SELECT uri, kind FROM sources").rows == [
        ("package:lading.seeds/a.yaml", "seed")
    ]


@pytest.mark.parametrize("any_database", ["sqlite"], indirect=True)  # a file
def test_nothing_is_written_when_nothing_is_new(seed: Write, settings: Settings, mine: Write) -> None:
    seed("a.yaml", "name: a\n")
    mine("m.yaml", "name: m\n")
    database = open_catalog(settings)
    assert database.path is not None
    before = database.path.read_bytes()
    open_catalog(settings)
    assert database.path.read_bytes() == before


def test_what_the_user_imported_stays_the_users(seed: Write, settings: Settings) -> None:
    seed("a.yaml", "name: a\n")
    database = open_catalog(settings)
    import_files(database, [card_file("name: mine\nv: 1\n---\nname: a\nv: mine\n")], replace=True)

    seed("a.yaml", "name: a\nv: 2\n---\nname: mine\nv: package\n---\nname: new\n")
    assert cards(settings) == {"a": '{"v":"mine"}', "mine": '{"v":1}', "new": "{}"}

    # What hid the package's card is withdrawn: it comes back.
    import_files(database, [card_file("name: mine\nv: 1\n")])
    assert cards(settings) == {"a": '{"v":2}', "mine": '{"v":1}', "new": "{}"}


def test_a_card_that_moves_between_seed_files(seed: Write, settings: Settings) -> None:
    seed("a.yaml", "name: x\n---\nname: y\n")
    seed("b.yaml", "name: z\n")
    cards(settings)
    seed("a.yaml", "name: y\n")
    seed("b.yaml", "name: z\n---\nname: x\nv: 2\n")
    assert cards(settings) == {"x": '{"v":2}', "y": "{}", "z": "{}"}


def test_an_older_package_takes_nothing_back(seed: Write, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    seed("a.yaml", "name: a\nv: new\n")
    set_version(monkeypatch, "0.10.0")
    cards(settings)
    seed("a.yaml", "name: a\nv: old\n")
    set_version(monkeypatch, "0.9.3")
    assert cards(settings) == {"a": '{"v":"new"}'}
    set_version(monkeypatch, "0.10.0.dev1")
    assert cards(settings) == {"a": '{"v":"old"}'}


def test_a_bad_seed_does_not_hide_the_good_ones(
    seed: Write, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    seed("a.yaml", "name: a\n---\nname: [b]\n")
    assert cards(settings) == {"a": "{}"}
    assert "A card that comes with a package was left out: a.yaml[1]" in caplog.text


def test_the_seeds_of_this_package(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    database = open_catalog(settings)
    assert query(database, "SELECT uri, problems FROM sources WHERE problems IS NOT NULL").rows == []
    assert query(database, "SELECT count(*) FROM sources WHERE kind <> 'seed'").rows == [(0,)]
    assert check_catalog(settings) == []


# --- the user's cards ------------------------------------------------------------------------------------------------


def test_cards_of_the_user(mine: Write, settings: Settings) -> None:
    assert cards(settings) == {}
    mine("a.yaml", "name: a\n---\nname: b\n")
    mine("deep/c.yml", "name: c\n")
    mine("d.jsonl", '{"name": "d"}\n{"name": "e"}\n')
    mine("notes.txt", "name: no\n")
    assert cards(settings).keys() == {"a", "b", "c", "d", "e"}

    mine("a.yaml", "name: a\nv: 2\n")
    (path := mine("d.jsonl", "")).unlink()
    assert not path.exists()
    assert cards(settings) == {"a": '{"v":2}', "c": "{}"}
    assert query(open_catalog(settings), "SELECT DISTINCT kind FROM sources").rows == [("user",)]


def test_a_single_file_may_be_named(tmp_path: Path, seed: Write) -> None:
    path = tmp_path / "my.cards"
    path.write_text("name: a\ncheckpoint: weights\n")
    settings = settings_in(tmp_path, card_paths=(path,))
    card = AssetStore(open_catalog(settings)).retrieve_card("a")
    assert card.field("checkpoint").as_uri() == f"file://{tmp_path}/weights"
    path.unlink()
    assert cards(settings) == {}


def test_a_file_that_was_only_touched(mine: Write, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mine("a.yaml", "name: a\n")
    open_catalog(settings)
    os.utime(path, ns=(5, 5))

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(refresh, "_parse", fail)
    database = open_catalog(settings)
    assert query(database, "SELECT mtime_ns FROM sources").rows == [(5,)]


def test_a_bad_file_breaks_nothing(mine: Write, settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    mine("good.yaml", "name: good\n")
    bad = mine("bad.yaml", "name: fine\n---\nname: [wrong]\n")
    assert cards(settings).keys() == {"good", "fine"}
    assert "Not all of your cards were imported: bad.yaml[1].name" in caplog.text

    caplog.clear()
    assert cards(settings).keys() == {"good", "fine"}
    assert f"Not all of the card file {bad} is in the catalog: bad.yaml[1].name" in caplog.text

    caplog.clear()
    mine("bad.yaml", "name: fine\n---\nname: right\n")
    assert cards(settings).keys() == {"good", "fine", "right"}
    assert caplog.text == ""


@pytest.mark.few(4)
@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"{" * 10_000, b"name: a\n\x00", b"- [", b"%YAML 9.9\n---\na"])
def test_a_file_that_is_no_card_file(
    mine: Write, settings: Settings, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    mine("bad.yaml", "").write_bytes(data)
    mine("good.yaml", "name: good\n")
    assert "good" in cards(settings)
    assert "Not all of your cards were imported: bad.yaml" in caplog.text


def test_a_link_that_leads_nowhere(tmp_path: Path, mine: Write, settings: Settings) -> None:
    mine("good.yaml", "name: good\n")
    (tmp_path / "cards" / "link.yaml").symlink_to("nowhere.yaml")
    assert cards(settings).keys() == {"good"}


def test_a_name_that_is_no_text(
    tmp_path: Path, mine: Write, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    mine("good.yaml", "name: good\n")
    Path(os.fsdecode(os.fsencode(tmp_path / "cards") + b"/\xff.yaml")).write_text("name: bad\n")
    assert cards(settings).keys() == {"good"}
    assert "its name is not Unicode text" in caplog.text


def test_a_name_of_the_package_is_not_the_users(
    seed: Write, mine: Write, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    seed("a.yaml", "name: a\n")
    mine("m.yaml", "name: a\nv: 2\n---\nname: a@user\nv: 3\n")
    store = AssetStore(open_catalog(settings))
    assert store.retrieve_card("a@").metadata == {}
    assert store.retrieve_card("a").metadata == {"v": 3}
    assert "'a' is already described differently by a.yaml[0] (package:lading.seeds/a.yaml)" in caplog.text


def test_two_processes_with_different_folders(tmp_path: Path, mine: Write, settings: Settings) -> None:
    """One does not withdraw what the other watches, unless the file is gone."""
    path = mine("a.yaml", "name: a\n")
    mine("README", "")
    other = settings_in(tmp_path)
    open_catalog(settings)
    assert cards(other).keys() == {"a"}
    path.unlink()
    assert cards(other) == {}


@pytest.mark.few(6)
@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("state", ["missing", "empty", "unreadable"])
def test_a_folder_that_is_out_of_sight(
    tmp_path: Path, mine: Write, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    state: str, deep: bool, watched: bool,
) -> None:  # fmt: skip
    """A share that is not mounted, or a folder that cannot be read, does not say that its cards are gone."""
    mine("a.yaml", "name: root\n")
    mine("deep/b.yaml", "name: deep\n")
    open_catalog(settings)
    top, away = tmp_path / "cards", tmp_path / "away"
    place = top / "deep" if deep else top
    place.rename(away)
    if state != "missing":
        place.mkdir()
    if state == "unreadable":

        def scandir(path: str) -> object:
            if unreadable and str(path).startswith(str(place)):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        real, unreadable = os.scandir, True
        (place / "else").touch()
        monkeypatch.setattr(os, "scandir", scandir)

    there = cards(settings if watched else settings_in(tmp_path))
    # The folder above tells that a folder within was removed, as git does with the last file in one.
    assert there.keys() == ({"root"} if state == "missing" and deep and watched else {"root", "deep"})
    assert ("stay in the catalog" in caplog.text) == (watched and there.keys() == {"root", "deep"})

    if state == "unreadable":
        unreadable = False
        (place / "else").unlink()
    if state != "missing":
        place.rmdir()
    away.rename(place)
    mine("a.yaml", "name: root\nv: 2\n")
    caplog.clear()
    assert cards(settings) == {"root": '{"v":2}', "deep": "{}"}
    assert caplog.text == ""


def test_a_folder_without_the_file_says_that_it_is_gone(tmp_path: Path, mine: Write, settings: Settings) -> None:
    path = mine("a.yaml", "name: a\n")
    open_catalog(settings)
    path.unlink()
    assert cards(settings).keys() == {"a"}
    mine("README", "cards of the team")
    assert cards(settings) == {}


def test_a_single_file_on_a_share(tmp_path: Path, seed: Write) -> None:
    (share := tmp_path / "share").mkdir()
    (share / "a.yaml").write_text("name: a\n")
    settings = settings_in(tmp_path, card_paths=(tmp_path / "own", share / "a.yaml"))
    open_catalog(settings)
    share.rename(tmp_path / "away")
    assert cards(settings).keys() == {"a"}
    (tmp_path / "away").rename(share)
    (share / "a.yaml").rename(share / "b.yaml")
    assert cards(settings) == {}


@pytest.mark.few(3)
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_a_file_of_the_same_size_and_times(
    mine: Write, settings: Settings, monkeypatch: pytest.MonkeyPatch, how: str, large: bool
) -> None:
    """As ``rsync -t``, ``cp -p``, ostree and the layers of containers leave it."""
    if large:
        monkeypatch.setattr(refresh, "_HASHED", 0)
    path = mine("a.yaml", "name: a\nv: 1\n")
    os.utime(path, ns=(10**18, 10**18))
    assert cards(settings) == {"a": '{"v":1}'}
    if how == "replaced":
        path.rename(path.with_name("old"))
    mine("a.yaml", "name: a\nv: 2\n")
    os.utime(path, ns=(10**18, 10**18))
    assert cards(settings) == {"a": '{"v":2}'}


def test_hidden_files_and_folders_are_no_card_files(
    tmp_path: Path, mine: Write, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    mine("team.yaml", "name: team\n")
    mine(".github/workflows/ci.yml", "name: CI\non: [push]\n")
    mine(".pre-commit-config.yaml", "repos: []\n")
    mine(".ipynb_checkpoints/team-checkpoint.yaml", "name: team\nv: old\n")
    # A volume that Kubernetes makes of a ConfigMap.
    mine("..2026_01_01/map.yaml", "name: map\n")
    (tmp_path / "cards" / "..data").symlink_to("..2026_01_01")
    (tmp_path / "cards" / "map.yaml").symlink_to("..data/map.yaml")
    assert cards(settings) == {"team": "{}", "map": "{}"}
    assert caplog.text == ""
    assert [file.source.rpartition("/")[2] for file in collect([tmp_path / "cards"])] == ["map.yaml", "team.yaml"]

    mine("..2026_01_02/map.yaml", "name: map\nv: 2\n")
    (tmp_path / "cards" / "..next").symlink_to("..2026_01_02")
    (tmp_path / "cards" / "..next").rename(tmp_path / "cards" / "..data")
    assert cards(settings) == {"team": "{}", "map": '{"v":2}'}


@pytest.mark.parametrize("second", ["name: dup\nv: 1\n", "name: dup\nv: 2\n"])
def test_one_of_two_files_that_state_a_name_goes(
    mine: Write, settings: Settings, caplog: pytest.LogCaptureFixture, second: str
) -> None:
    first = mine("a.yaml", "name: dup\nv: 1\n")
    mine("b.yaml", second)
    assert cards(settings) == {"dup": '{"v":1}'}
    caplog.clear()
    first.unlink()
    assert cards(settings) == {"dup": f'{{"v":{second[-2]}}}'}
    assert caplog.text == ""


def test_a_name_that_another_file_withdraws(
    tmp_path: Path, mine: Write, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """What hid it may be a file that was imported by name, or one that states something else now."""
    mine("b.yaml", "name: x\nv: 2\n---\nname: y\nv: 2\n")
    (imported := tmp_path / "imported.yaml").write_text("name: x\nv: 1\n")
    database = open_catalog(settings_in(tmp_path))
    import_files(database, collect([imported]))
    mine("a.yaml", "name: y\nv: 1\n")
    assert cards(settings) == {"x": '{"v":1}', "y": '{"v":1}'}

    imported.write_text("name: z\n")
    import_files(database, collect([imported]))
    mine("a.yaml", "name: y\nv: 2\n")
    caplog.clear()
    assert cards(settings) == {"x": '{"v":2}', "y": '{"v":2}', "z": "{}"}
    assert caplog.text == ""


def test_a_file_that_was_imported_is_moved_into_the_watched_folder(
    tmp_path: Path, mine: Write, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    (path := tmp_path / "a.yaml").write_text("name: a\nv: 1\n")
    import_files(open_catalog(settings), collect([path]))
    path.rename(mine("a.yaml", ""))
    assert cards(settings) == {"a": '{"v":1}'}
    mine("a.yaml", "name: a\nv: 2\n")
    assert cards(settings) == {"a": '{"v":2}'}
    assert query(open_catalog(settings), "SELECT uri FROM sources WHERE kind <> 'seed'").rows == [
        (f"file://{tmp_path}/cards/a.yaml",)
    ]
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["fifo", "socket", "large"])
def test_what_is_not_read(
    tmp_path: Path, mine: Write, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:  # fmt: skip
    mine("good.yaml", "name: good\n")
    path = tmp_path / "cards" / "odd.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # the path of a socket has at most 107 characters
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    else:
        path.touch()
        os.truncate(path, 2 << 30)
    assert cards(settings).keys() == {"good"}
    assert f"{path} cannot be read" in caplog.text
    with pytest.raises(CardFileError, match=r"odd\.yaml: expected a .*file"):
        import_files(open_catalog(settings), collect([path]))


def test_a_file_that_was_imported_by_name_becomes_the_users(mine: Write, settings: Settings, tmp_path: Path) -> None:
    path = mine("a.yaml", "name: a\n")
    import_files(open_catalog(settings_in(tmp_path)), collect([path]))
    mine("a.yaml", "name: a\nv: 2\n")
    assert cards(settings) == {"a": '{"v":2}'}
    assert query(open_catalog(settings), "SELECT kind FROM sources").rows == [("user",)]
    mine("a.yaml", "name: a\nv: 33\n")
    import_files(open_catalog(settings_in(tmp_path)), collect([path]))
    assert query(open_catalog(settings), "SELECT kind FROM sources").rows == [("user",)]


# --- families --------------------------------------------------------------------------------------------------------


def test_families(seed: Write, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = [("one", "pkg.one:FAMILY"), ("two", "pkg.two:FAMILY")]

    def entry_points(group: str) -> EntryPoints:
        named = registered if group == "lading.families" else []
        return EntryPoints(EntryPoint(name, value, group) for name, value in named)

    monkeypatch.setattr(refresh, "registered", entry_points)
    seed("a.yaml", "name: a\nmodel_family: one\ncheckpoint: hg://x\n---\nname: b\nmodel_family: nobody\n")

    def families() -> dict[str, bool]:
        return {f.name: f.registered for f in AssetStore(open_catalog(settings)).families()}

    def status() -> list[str | None]:
        return [m.status for m in AssetStore(open_catalog(settings)).models()]

    assert families() == {"nobody": False, "one": True, "two": True}
    assert status() == ["remote", "unknown-family"]

    registered[:] = [("nobody", "pkg.nobody:FAMILY")]
    assert families() == {"nobody": True, "one": False}
    assert status() == ["unknown-family", "gated"]
