"""Opening a catalog: what is made, what is refused, and what still works when little does."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import text

from lading.catalog import open as open_module
from lading.catalog.check import check_catalog
from lading.catalog.checkpoints.record import record_checkpoint
from lading.catalog.database import connection as engine
from lading.catalog.database import migrate as lifecycle
from lading.catalog.database import target as target_module
from lading.catalog.database.target import APPLICATION_ID, SCHEMA_VERSION, Found, Target
from lading.catalog.import_cards import import_files
from lading.catalog.importing import refresh
from lading.catalog.open import open_catalog, open_catalog_readonly
from lading.catalog.query import run_query as query
from lading.catalog.records import CheckpointContents
from lading.catalog.store import AssetStore
from lading.errors import CatalogError, CatalogOutdatedError
from tests.helpers.catalog_tools import card_file, make_manifest, nobody, public_folder, settings_in
from tests.helpers.postgresql_server import Server

CARD = "name: mine\nmodel_family: qwen\ncheckpoint: hg://a/b\n"


@pytest.fixture(autouse=True)
def seeds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One card in place of those that come with the package, where every user can read it."""
    with public_folder() as folder:
        (folder / "built_in.yaml").write_text("name: built_in\nmodel_family: qwen\ncheckpoint: hg://x/y\n")
        monkeypatch.setattr(refresh, "files", lambda package: folder)
        yield folder


@pytest.fixture
def public() -> Iterator[Path]:
    with public_folder() as folder:
        yield folder


def raw(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(sql).fetchall()


# --- first use -------------------------------------------------------------------------------------------------------


def test_the_first_use_makes_everything(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "not" / "yet" / "there")
    database = open_catalog(settings)
    path = tmp_path / "not" / "yet" / "there" / "catalog.sqlite"
    assert database.path == path
    assert database.url == f"sqlite:///{path}"
    assert database.writable
    assert raw(path, "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert raw(path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]
    assert raw(path, "PRAGMA journal_mode") == [("wal",)]
    assert AssetStore(database).asset_names == {"built_in"}
    assert check_catalog(settings) == []


def test_the_first_use_of_a_server_makes_everything(tmp_path: Path, postgresql: Server) -> None:
    settings = settings_in(tmp_path, database_url=postgresql.empty("first_use"))
    assert AssetStore(open_catalog(settings)).asset_names == {"built_in"}
    assert check_catalog(settings) == []


def test_without_leave_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"No catalog exists at .*catalog\.sqlite yet\. `lading list` makes one"):
        open_catalog_readonly(settings_in(tmp_path))
    assert not (tmp_path / "catalog.sqlite").exists()

    open_catalog(settings_in(tmp_path))
    assert not open_catalog_readonly(settings_in(tmp_path)).writable


def test_an_empty_file_is_a_catalog_before_its_birth(tmp_path: Path) -> None:
    (tmp_path / "catalog.sqlite").touch()
    assert AssetStore(open_catalog(settings_in(tmp_path))).asset_names == {"built_in"}


def test_a_database_without_tables_is_one_too(tmp_path: Path) -> None:
    raw(tmp_path / "catalog.sqlite", "VACUUM")
    assert (tmp_path / "catalog.sqlite").stat().st_size > 0
    assert AssetStore(open_catalog(settings_in(tmp_path))).asset_names == {"built_in"}


def test_what_a_creation_that_was_cut_off_leaves(tmp_path: Path) -> None:
    (tmp_path / "catalog.sqlite").write_bytes(bytes(8192))
    (tmp_path / "catalog.sqlite-journal").write_bytes(bytes(512))
    # The journal is not a valid one, so SQLite does not roll back; the file is then not a database.
    with pytest.raises(CatalogError, match="damaged"):
        open_catalog(settings_in(tmp_path))


def test_odd_paths(tmp_path: Path) -> None:
    folder = tmp_path / "50% #1 ?x=y; ünïcode &c"
    path = folder / "a b.sqlite"
    settings = settings_in(tmp_path, database_url=f"sqlite:///{path}")
    database = open_catalog(settings)
    assert database.path is not None
    assert database.path.exists()
    assert query(database, "SELECT count(*) FROM cards").rows == [(1,)]
    assert check_catalog(settings) == []
    assert lifecycle.backup(settings).exists()


def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    database = open_catalog(settings_in(tmp_path, database_url="sqlite:///here.sqlite"))
    monkeypatch.chdir("/")
    assert AssetStore(database).asset_names == {"built_in"}
    assert database.path == tmp_path / "here.sqlite"


def test_in_memory(tmp_path: Path) -> None:
    database = open_catalog(settings_in(tmp_path, database_url="sqlite://"))
    import_files(database, [card_file(CARD)])
    assert AssetStore(database).asset_names == {"built_in", "mine"}
    assert database.path is None
    assert list(tmp_path.glob("*.sqlite")) == []


def test_threads_share_a_catalog_in_memory(tmp_path: Path) -> None:
    database = open_catalog(settings_in(tmp_path, database_url="sqlite://"))
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(5):
                import_files(database, [card_file(f"name: t{number}_{i}\n", f"file:///c/{number}_{i}.yaml")])
                assert f"t{number}_{i}" in AssetStore(database).asset_names
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(AssetStore(database).asset_names) == 21


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "expected to be a URL"),
        ("sqlite:////tmp/x.sqlite?mode=ro", "takes no parameters"),
        ("nosuch://host/db", "No driver"),
        ("postgresql+nosuchdriver://host/db", "No driver"),
    ],
)
def test_urls_that_name_no_database(tmp_path: Path, url: str, words: str) -> None:
    with pytest.raises(CatalogError, match=words):
        open_catalog(settings_in(tmp_path, database_url=url))


SECRET = "sek%ret1"
"""With a sign that URLs write in another way."""


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://me:{quoted}@127.0.0.1:1/x",
        "postgresql://me:{quoted}@127.0.0.1:1/x",
        "postgresql+nosuchdriver://me:{quoted}@127.0.0.1/x",
        "postgresql+psycopg://:{quoted}@/x?host=/run/postgresql",
        "postgresql+psycopg://127.0.0.1:1/x?user=me&password={quoted}",
        "postgresql+psycopg://127.0.0.1:1/x?sslmode=require&sslpassword={quoted}",
        "postgresql+psycopg://127.0.0.1:1/x?password={quoted}&password={quoted}",
        "postgres://me:{quoted}@127.0.0.1/x",
        "mysql://me:{quoted}@127.0.0.1/x",
        # Not URLs, or read as something other than they say.
        "postgresql+psycopg:/me:{plain}@host/db",
        "postgresql+psycopg:://me:{plain}@host/db",
        "postgresql+psycopg//me:{plain}@host/db",
        "postgresql+psycopg://me:{plain}@[::1/db",
        "postgresql://me:{plain}@host:port/db",
        "postgresql://me:{plain}/db",
        "postgresql+psycopg://host:port/x?user=me&password={plain}",
        "host=127.0.0.1 user=me password={plain}",
        "me:{plain}@host/x",
        "postgresql+psycopg://me:a/{plain}@host/x",
        "postgresql+psycopg://me:a@{plain}@host/x",
        "postgresql+psycopg://me:a@b/{plain}@host/x",
        "postgresql+psycopg://me:a@b?{plain}@host/x",
        "sqlite:///x?password={plain}",
        "sqlite://me:{plain}@host/x",
    ],
)
def test_a_password_is_not_shown(tmp_path: Path, url: str) -> None:
    text = url.format(plain=SECRET, quoted=quote(SECRET, safe=""))
    settings = settings_in(tmp_path, database_url=text)
    with pytest.raises(CatalogError) as caught:
        open_catalog(settings)
    shown = f"{caught.value}{settings!r}"
    try:
        target = Target.from_url(text)
    except CatalogError:
        pass
    else:
        shown += f"{target}{target!r}{target.shown_url}"
        secret = str(target.url.password or SECRET)
        shown += target.without_secrets(f"the driver quotes {secret}, {secret!r} and {quote(secret, safe='')}")
        assert str(target).startswith(text.partition("://")[0])
    assert "sek" not in shown
    assert "ret1" not in shown


def test_the_harmless_parts_of_a_url_are_shown() -> None:
    target = Target.from_url("postgresql+psycopg://me:secret@host:5/db?sslmode=require")
    assert str(target) == "postgresql+psycopg://me:***@host:5/db"
    with pytest.raises(CatalogError, match=r"but is '/data/catalog\.sqlite'"):
        Target.from_url("/data/catalog.sqlite")


def test_paths_that_look_like_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("what?/c.sqlite", "a=b?c=d&e/c.sqlite", "a%41b.sqlite", "me@home:5/c#1.sqlite", ":memory:/c.sqlite"):
        path = tmp_path / name
        assert Target.from_url(f"sqlite:///{path}").path == path
    monkeypatch.chdir(tmp_path)
    assert Target.from_url("sqlite:///here.sqlite").path == tmp_path / "here.sqlite"
    assert Target.from_url("sqlite+pysqlite:///here.sqlite").path == tmp_path / "here.sqlite"
    assert Target.from_url("sqlite:///:memory:").path is None
    with pytest.raises(CatalogError, match="names a host"):
        Target.from_url("sqlite://data/catalog.sqlite")


# --- other files -----------------------------------------------------------------------------------------------------


def foreign_database(path: Path) -> None:
    raw(path, "CREATE TABLE songs (title TEXT)")


def foreign_id(path: Path) -> None:
    raw(path, "PRAGMA application_id = 42")


def foreign_wal(path: Path) -> None:
    raw(path, "PRAGMA journal_mode = wal")
    Path(f"{path}-wal").write_bytes(b"x" * 32)


def text_file(path: Path) -> None:
    path.write_text("dear diary\n" * 100)


def short_file(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(4096))


@pytest.mark.parametrize("make", [foreign_database, foreign_id, foreign_wal, text_file, short_file, zeros])
def test_another_file_is_left_alone(tmp_path: Path, make: object) -> None:
    path = tmp_path / "catalog.sqlite"
    make(path)  # type: ignore[operator]
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir() if p.is_file()}

    settings = settings_in(tmp_path)
    for door in (open_catalog, lifecycle.upgrade, check_catalog, lifecycle.backup):
        with pytest.raises(CatalogError, match="is another kind of file; it was left as it is"):
            door(settings)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir() if p.is_file()} == before


def test_a_folder_is_no_catalog(tmp_path: Path) -> None:
    (tmp_path / "catalog.sqlite").mkdir()
    with pytest.raises(CatalogError, match="is a folder"):
        open_catalog(settings_in(tmp_path))


@pytest.mark.parametrize("path", ["file/catalog.sqlite", "file/folder/catalog.sqlite"])
def test_a_file_where_the_folder_should_be(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    settings = settings_in(tmp_path, database_url=f"sqlite:///{tmp_path / path}")
    with pytest.raises(CatalogError, match=r"cannot be a folder .*LADING_DATABASE_URL"):
        open_catalog(settings)


def test_a_pipe_is_no_catalog(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "catalog.sqlite")
    with pytest.raises(CatalogError, match="expected to be a file"):
        open_catalog(settings_in(tmp_path))


def test_a_foreign_database_that_came_while_we_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_database(tmp_path / "catalog.sqlite")
    monkeypatch.setattr(open_module, "peek", lambda path: Found.NOTHING)
    before = (tmp_path / "catalog.sqlite").read_bytes()
    with pytest.raises(CatalogError, match="another kind of file"):
        open_catalog(settings_in(tmp_path))
    assert (tmp_path / "catalog.sqlite").read_bytes() == before


# --- versions --------------------------------------------------------------------------------------------------------


def test_a_newer_schema(tmp_path: Path) -> None:
    open_catalog(settings_in(tmp_path))
    raw(tmp_path / "catalog.sqlite", "PRAGMA user_version = 99")
    for door in (open_catalog, lifecycle.upgrade):
        with pytest.raises(CatalogOutdatedError, match="pip install --upgrade lading-hub") as caught:
            door(settings_in(tmp_path))
        assert (caught.value.expected, caught.value.found) == (SCHEMA_VERSION, 99)


def test_an_older_schema_is_not_touched(tmp_path: Path) -> None:
    open_catalog(settings_in(tmp_path))
    raw(tmp_path / "catalog.sqlite", "PRAGMA user_version = 0")
    with pytest.raises(CatalogOutdatedError, match="lading db upgrade") as caught:
        open_catalog(settings_in(tmp_path))
    assert caught.value.found == 0
    assert raw(tmp_path / "catalog.sqlite", "PRAGMA user_version") == [(0,)]


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_file(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    database = open_catalog(settings)
    import_files(
        database, [card_file("".join(f"name: c{i}\nnote: {'x' * 500}\n---\n" for i in range(200)) + "name: z")]
    )
    path = tmp_path / "catalog.sqlite"
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)

    with pytest.raises(CatalogError, match=r"damaged.*`lading db check`"):
        open_catalog(settings)
    assert any("damaged" in line or "damage:" in line for line in check_catalog(settings))


def test_a_missing_table_is_damage(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    open_catalog(settings)
    raw(tmp_path / "catalog.sqlite", "DROP TABLE sources")
    with pytest.raises(CatalogError, match=r"table sources is missing.*`lading db restore FILE`"):
        open_catalog(settings)
    assert any("sources is missing" in line or "no such table" in line for line in check_catalog(settings))


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    database = open_catalog(settings_in(tmp_path))
    (tmp_path / "catalog.sqlite").unlink()
    with pytest.raises(FileNotFoundError):
        _ = AssetStore(database).asset_names
    assert not (tmp_path / "catalog.sqlite").exists()


# --- transactions ----------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    database = open_catalog(settings_in(tmp_path))

    def write() -> None:
        with database.write() as connection:
            connection.execute(text("INSERT INTO families (name) VALUES ('gone')"))
            raise KeyError

    with pytest.raises(KeyError):
        write()
    with database.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM families WHERE name = 'gone'")).scalar() == 0


def test_a_read_sees_one_state(tmp_path: Path) -> None:
    database = open_catalog(settings_in(tmp_path))
    with database.read() as connection:
        before = connection.execute(text("SELECT count(*) FROM cards")).scalar()
        import_files(database, [card_file(CARD)])
        assert connection.execute(text("SELECT count(*) FROM cards")).scalar() == before
    assert "mine" in AssetStore(database).asset_names


def test_the_error_names_the_process_that_holds_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = open_catalog(settings_in(tmp_path))
    monkeypatch.setattr(target_module, "BUSY_TIMEOUT_S", 0.05)
    script = (
        "import sqlite3, sys\n"
        f"c = sqlite3.connect({str(tmp_path / 'catalog.sqlite')!r}, isolation_level=None)\n"
        "c.execute('BEGIN IMMEDIATE')\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(CatalogError, match=rf"Another process has been writing.*process {holder.pid}\)"):
            import_files(database, [card_file(CARD)])
        assert "mine" not in AssetStore(database).asset_names  # reading goes on
        assert holder.stdin is not None
        holder.stdin.close()
    import_files(database, [card_file(CARD)])


def test_a_refresh_that_must_wait_too_long_is_put_off(
    tmp_path: Path, seeds: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_catalog(settings_in(tmp_path))
    (seeds / "more.yaml").write_text("name: more\n")
    monkeypatch.setattr(target_module, "BUSY_TIMEOUT_S", 0.05)
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        assert AssetStore(open_catalog(settings_in(tmp_path))).asset_names == {"built_in"}
    assert "could not be brought up to date" in caplog.text
    assert AssetStore(open_catalog(settings_in(tmp_path))).asset_names == {"built_in", "more"}


def test_a_full_disk(tmp_path: Path) -> None:
    database = open_catalog(settings_in(tmp_path))

    def fill() -> None:
        with database.write() as connection:
            (pages,) = connection.execute(text("PRAGMA page_count")).one()
            connection.execute(text(f"PRAGMA max_page_count = {pages}"))
            for i in range(2000):
                connection.execute(text("INSERT INTO families (name) VALUES (:n)"), {"n": f"{i:0500}"})

    with pytest.raises(OSError, match="No space left") as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
    assert check_catalog(settings_in(tmp_path)) == []


def test_children_of_a_fork_use_it_too(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from tests.helpers.catalog_tools import card_file, settings_in\n"
        "from lading.catalog.open import open_catalog\n"
        "from lading.catalog.import_cards import import_files\n"
        "from lading.catalog.store import AssetStore\n"
        "database = open_catalog(settings_in(Path(sys.argv[2])))\n"
        "store = AssetStore(database)\n"
        "before = len(store.asset_names)\n"
        "children = []\n"
        "for i in range(3):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        import_files(database, [card_file(f'name: f{i}', f'file:///c/{i}.yaml')])\n"
        "        os._exit(0 if f'f{i}' in store.asset_names else 1)\n"
        "    children.append(pid)\n"
        "assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)\n"
        "assert len(store.asset_names) == before + 3\n"
    )
    tests = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", script, str(tests), str(tmp_path)], check=True)


# --- no rights -------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written(public: Path) -> None:
    settings = settings_in(public)
    import_files(open_catalog(settings), [card_file(CARD)])
    public.chmod(0o555)
    try:
        with nobody():
            database = open_catalog(settings)
            store = AssetStore(database)
            assert not database.writable
            assert store.asset_names == {"built_in", "mine"}
            assert store.retrieve_card("mine").field("checkpoint").value == "hg://a/b"
            assert query(database, "SELECT name FROM models ORDER BY 1").rows == [("built_in",), ("mine",)]
            assert check_catalog(settings) == []
            with pytest.raises(CatalogError, match=r"cannot be written.* LADING_DATABASE_URL"):
                import_files(database, [card_file("name: other")])
    finally:
        public.chmod(0o755)
    assert [p.name for p in public.iterdir()] == ["catalog.sqlite"]


def test_a_catalog_that_another_user_writes(public: Path) -> None:
    settings = settings_in(public)
    owner = open_catalog(settings)
    with owner.read():  # holds the log open, as a process of the owner would
        with nobody():
            reader = AssetStore(open_catalog(settings))
            assert not reader.database.writable
            assert reader.asset_names == {"built_in"}
        import_files(owner, [card_file(CARD)])
        with nobody():
            assert reader.asset_names == {"built_in", "mine"}
    with nobody():
        assert reader.asset_names == {"built_in", "mine"}


def test_a_load_goes_on_without_a_record(public: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_in(public)
    open_catalog(settings)
    public.chmod(0o555)
    with nobody(), caplog.at_level(logging.INFO, "lading"):
        database = open_catalog(settings)
        record_checkpoint(database, CheckpointContents(uri="hg://a/b", manifest=make_manifest()))
        assert AssetStore(database).checkpoint("hg://a/b") is None
    public.chmod(0o755)
    assert "the manifest of hg://a/b is not kept" in caplog.text


def test_a_home_that_cannot_be_written(caplog: pytest.LogCaptureFixture) -> None:
    database = open_catalog(settings_in(Path("/sys/nobody/makes/folders/here")))
    assert not database.writable
    assert AssetStore(database).asset_names == {"built_in"}
    assert query(database, "SELECT name FROM models").rows == [("built_in",)]
    assert "No catalog can be made at" in caplog.text
    with pytest.raises(CatalogError, match="cannot be written"):
        import_files(database, [card_file(CARD)])


def test_a_file_that_cannot_be_read(public: Path) -> None:
    settings = settings_in(public)
    open_catalog(settings)
    (public / "catalog.sqlite").chmod(0o600)
    with nobody(), pytest.raises(PermissionError):
        open_catalog(settings)


def test_cards_of_the_user_beside_a_catalog_of_others(public: Path, caplog: pytest.LogCaptureFixture) -> None:
    cards = public / "cards"
    cards.mkdir()
    settings = settings_in(public, card_paths=(cards,))
    open_catalog(settings)
    (cards / "mine.yaml").write_text(CARD)
    public.chmod(0o555)
    with nobody():
        assert AssetStore(open_catalog(settings)).asset_names == {"built_in"}
    public.chmod(0o755)
    assert "Your card files changed, but the catalog" in caplog.text


# --- journal ---------------------------------------------------------------------------------------------------------


def test_no_shared_memory_on_a_network_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "on_network", lambda path: True)
    open_catalog(settings_in(tmp_path))
    assert raw(tmp_path / "catalog.sqlite", "PRAGMA journal_mode") == [("delete",)]

    # One that came from a local disk is changed back.
    raw(tmp_path / "catalog.sqlite", "PRAGMA journal_mode = wal")
    database = open_catalog(settings_in(tmp_path))
    assert raw(tmp_path / "catalog.sqlite", "PRAGMA journal_mode") == [("delete",)]
    import_files(database, [card_file(CARD)])
    assert AssetStore(database).asset_names == {"built_in", "mine"}


def test_the_log_is_turned_on_again(tmp_path: Path) -> None:
    open_catalog(settings_in(tmp_path))
    raw(tmp_path / "catalog.sqlite", "PRAGMA journal_mode = delete")
    open_catalog(settings_in(tmp_path))
    assert raw(tmp_path / "catalog.sqlite", "PRAGMA journal_mode") == [("wal",)]


# --- light -----------------------------------------------------------------------------------------------------------


def test_opening_and_listing_stay_light(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lading.system.settings import Settings\n"
        "from lading.catalog.open import open_catalog\n"
        "from lading.catalog.store import AssetStore\n"
        "from lading.catalog.query import run_query as query\n"
        f"url = 'sqlite:///{tmp_path}/c.sqlite'\n"
        "s = Settings(database_url=url, cache_dir=Path('/'), card_paths=(), env=None, offline=True)\n"
        "database = open_catalog(s)\n"
        "AssetStore(database).models()\n"
        "AssetStore(database).architectures()\n"
        "query(database, 'SELECT * FROM models')\n"
        "print(' '.join(sys.modules))\n"
    )
    heavy = {"torch", "pydantic", "alembic", "ruamel.yaml", "numpy"}
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    second = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert not heavy & set(second.stdout.split())
