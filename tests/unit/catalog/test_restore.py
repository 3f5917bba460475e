"""Backups put back, and the logs that SQLite keeps beside a catalog: those of another file, and those left behind."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lading.catalog.check import check_catalog
from lading.catalog.database import migrate as lifecycle
from lading.catalog.database import target as target_module
from lading.catalog.database.target import SCHEMA_VERSION
from lading.catalog.import_cards import import_files
from lading.catalog.importing import refresh
from lading.catalog.open import open_catalog, open_catalog_readonly
from lading.catalog.store import AssetStore
from lading.errors import CatalogError, CatalogOutdatedError
from lading.system.settings import Settings
from tests.helpers.catalog_tools import card_file, nobody, public_folder, settings_in


@pytest.fixture(autouse=True)
def seeds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with public_folder() as folder:
        (folder / "built_in.yaml").write_text("name: built_in\nmodel_family: qwen\ncheckpoint: hg://x/y\n")
        monkeypatch.setattr(refresh, "files", lambda package: folder)
        yield folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Those of a catalog with a card called `before`, and a backup of it in `backup.sqlite`."""
    settings = settings_in(tmp_path)
    import_files(open_catalog(settings), [card_file("name: before\n")])
    lifecycle.backup(settings, tmp_path / "backup.sqlite")
    return settings


def names(settings: Settings) -> set[str]:
    return set(AssetStore(open_catalog(settings)).asset_names)


def raw(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(sql).fetchall()


def killed_while(path: Path, *statements: str) -> None:
    """Run statements in a process that is then killed, so that its log stays."""
    script = (
        "import os, sqlite3, signal\n"
        f"c = sqlite3.connect({str(path)!r}, isolation_level=None)\n"
        f"for s in {statements!r}: c.execute(s)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=False)


def leave_a_log(path: Path) -> Path:
    """A write-ahead log with a committed card called `ghost`, as a writer that was killed leaves it."""
    killed_while(
        path,
        "PRAGMA journal_mode = wal",
        "PRAGMA wal_autocheckpoint = 0",
        "INSERT INTO cards (name, env, metadata, source_id, position) SELECT 'ghost', '', '{}', min(id), 999 "
        "FROM sources",
    )
    log = Path(f"{path}-wal")
    assert log.stat().st_size > 0
    return log


def leave_a_journal(path: Path) -> Path:
    """A hot rollback journal, as a writer that was killed in a transaction leaves it."""
    killed_while(
        path,
        "PRAGMA journal_mode = delete",
        "PRAGMA cache_size = 2",
        "BEGIN IMMEDIATE",
        "UPDATE cards SET license = 'half'",
        "CREATE TABLE big AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 5000) "
        "SELECT i, hex(randomblob(100)) FROM n",
    )
    journal = Path(f"{path}-journal")
    assert journal.stat().st_size > 0
    return journal


# --- restore ---------------------------------------------------------------------------------------------------------


def test_what_came_after_the_backup_is_gone_and_kept(tmp_path: Path, settings: Settings) -> None:
    import_files(open_catalog(settings), [card_file("name: after\n", "file:///cards/b.yaml")])
    report = lifecycle.restore(settings, tmp_path / "backup.sqlite")
    assert names(settings) == {"built_in", "before"}
    assert check_catalog(settings) == []
    assert report.version == SCHEMA_VERSION
    assert report.backup is not None
    assert names(settings_in(tmp_path, database_url=f"sqlite:///{report.backup}")) == {"built_in", "before", "after"}


def test_over_a_log(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "catalog.sqlite"
    leave_a_log(path)
    report = lifecycle.restore(settings, tmp_path / "backup.sqlite")
    assert names(settings) == {"built_in", "before"}
    assert check_catalog(settings) == []
    assert report.backup is not None
    assert raw(report.backup, "SELECT count(*) FROM cards WHERE name = 'ghost'") == [(1,)]


def test_over_a_journal(tmp_path: Path, settings: Settings) -> None:
    leave_a_journal(tmp_path / "catalog.sqlite")
    lifecycle.restore(settings, tmp_path / "backup.sqlite")
    assert names(settings) == {"built_in", "before"}
    assert raw(tmp_path / "catalog.sqlite", "SELECT count(*) FROM cards WHERE license = 'half'") == [(0,)]
    assert check_catalog(settings) == []


def test_where_the_catalog_was_moved_away_from_its_log(tmp_path: Path, settings: Settings) -> None:
    leave_a_log(tmp_path / "catalog.sqlite")
    (tmp_path / "catalog.sqlite").rename(tmp_path / "moved.sqlite")
    assert lifecycle.restore(settings, tmp_path / "backup.sqlite").backup is None
    assert names(settings) == {"built_in", "before"}
    assert check_catalog(settings) == []


@pytest.mark.parametrize("begin", [16, 100, 4096])
def test_over_a_damaged_file(tmp_path: Path, settings: Settings, begin: int) -> None:
    path = tmp_path / "catalog.sqlite"
    leave_a_log(path)
    raw(path, "PRAGMA wal_checkpoint(truncate)")
    data = bytearray(path.read_bytes())
    data[begin : 68 if begin == 16 else len(data)] = b"\xa5" * ((68 if begin == 16 else len(data)) - begin)
    path.write_bytes(data)
    with pytest.raises(CatalogError, match=r"damaged.*`lading db restore FILE`"):
        open_catalog(settings)
    report = lifecycle.restore(settings, tmp_path / "backup.sqlite")
    assert report.backup is not None
    assert report.backup.stat().st_size == len(data)
    assert names(settings) == {"built_in", "before"}
    assert check_catalog(settings) == []


def test_a_backup_with_a_log_of_its_own(tmp_path: Path, settings: Settings) -> None:
    log = leave_a_log(tmp_path / "catalog.sqlite")
    (tmp_path / "copies").mkdir()
    for file in (tmp_path / "catalog.sqlite", log):
        shutil.copy(file, tmp_path / "copies" / file.name)
    lifecycle.restore(settings, tmp_path / "backup.sqlite")
    lifecycle.restore(settings, tmp_path / "copies" / "catalog.sqlite")
    assert raw(tmp_path / "catalog.sqlite", "SELECT count(*) FROM cards WHERE name = 'ghost'") == [(1,)]


def test_a_backup_of_an_older_version(tmp_path: Path, settings: Settings) -> None:
    lifecycle.downgrade(settings, "1")
    lifecycle.backup(settings, tmp_path / "old?.sqlite")
    lifecycle.upgrade(settings)
    assert lifecycle.restore(settings, tmp_path / "old?.sqlite").version == 1
    with pytest.raises(CatalogOutdatedError, match="lading db upgrade"):
        open_catalog(settings)
    lifecycle.upgrade(settings)
    assert names(settings) == {"built_in", "before"}


def test_what_is_no_good_backup_changes_nothing(tmp_path: Path, settings: Settings) -> None:
    backup = (tmp_path / "backup.sqlite").read_bytes()
    bad = tmp_path / "bad.sqlite"
    before = (tmp_path / "catalog.sqlite").read_bytes()

    def refused(error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            lifecycle.restore(settings, bad)
        bad.unlink(missing_ok=True)
        assert (tmp_path / "catalog.sqlite").read_bytes() == before

    refused(FileNotFoundError, "No such file")
    bad.write_text("dear diary")
    refused(CatalogError, "another kind of file")
    bad.write_bytes(backup[:4096] + b"\xa5" * (len(backup) - 4096))
    refused(CatalogError, "damaged")
    bad.write_bytes(backup[: len(backup) // 2])
    refused(CatalogError, "damaged|not a whole catalog")
    bad.write_bytes(backup)
    raw(bad, "PRAGMA user_version = 99")
    refused(CatalogOutdatedError, "pip install --upgrade")
    bad.write_bytes(backup)
    raw(bad, "CREATE TRIGGER strange AFTER INSERT ON families BEGIN DELETE FROM cards; END")
    refused(CatalogError, "a trigger strange, which lading did not make")
    bad.write_bytes(backup)
    raw(bad, "DELETE FROM sources")
    refused(CatalogError, "lost reference")
    with pytest.raises(CatalogError, match="is the catalog itself"):
        lifecycle.restore(settings, tmp_path / "catalog.sqlite")
    assert [p for p in tmp_path.iterdir() if ".v" in p.name] == []


@pytest.mark.parametrize("url", ["sqlite://", "postgresql+psycopg://host/x"])
def test_what_has_no_file_takes_no_backup(tmp_path: Path, settings: Settings, url: str) -> None:
    with pytest.raises(CatalogError, match="has no file"):
        lifecycle.restore(settings_in(tmp_path, database_url=url), tmp_path / "backup.sqlite")


def test_a_restore_waits_for_no_writer_without_end(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (target_module, lifecycle):
        monkeypatch.setattr(module, "BUSY_TIMEOUT_S", 0.05)
    before = raw(tmp_path / "catalog.sqlite", "SELECT name FROM cards")
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(CatalogError, match="Another process has been writing"):
            lifecycle.restore(settings, tmp_path / "backup.sqlite")
    assert raw(tmp_path / "catalog.sqlite", "SELECT name FROM cards") == before


# --- a log of another file -------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("door", [names, check_catalog, lifecycle.upgrade, lifecycle.backup])
def test_a_backup_that_was_copied_over_a_log(
    tmp_path: Path, settings: Settings, door: object, caplog: pytest.LogCaptureFixture
) -> None:
    log = leave_a_log(tmp_path / "catalog.sqlite")
    left = log.read_bytes()
    shutil.copy(tmp_path / "backup.sqlite", tmp_path / "catalog.sqlite")
    door(settings)  # type: ignore[operator]
    assert "`lading db restore FILE`" in caplog.text
    assert names(settings) == {"built_in", "before"}
    assert check_catalog(settings) == []
    (aside,) = tmp_path.glob("catalog.sqlite-wal.*")
    assert aside.read_bytes() == left


def test_a_reader_beside_a_log_of_another_file(settings: Settings, tmp_path: Path) -> None:
    log = leave_a_log(tmp_path / "catalog.sqlite")
    with public_folder() as folder:
        shutil.copy(tmp_path / "backup.sqlite", folder / "catalog.sqlite")
        shutil.copy(log, folder / "catalog.sqlite-wal")
        folder.chmod(0o555)
        with nobody():
            assert names(settings_in(folder)) == {"built_in", "before"}
            assert check_catalog(settings_in(folder)) == []
        folder.chmod(0o755)


# --- a log that is needed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", [leave_a_log, leave_a_journal])
def test_a_reader_who_cannot_use_the_log(tmp_path: Path, leave: object) -> None:
    with public_folder() as folder, public_folder() as other:
        open_catalog(settings_in(folder))
        log = leave(folder / "catalog.sqlite")  # type: ignore[operator]
        for file in (folder / "catalog.sqlite", log):
            shutil.copy(file, other / file.name)
            (other / file.name).chmod(0o644)
        before = {p.name: p.read_bytes() for p in other.iterdir()}
        other.chmod(0o555)
        with nobody():
            for door in (open_catalog, open_catalog_readonly, lifecycle.backup, lifecycle.upgrade):
                with pytest.raises(CatalogError, match=log.name):
                    door(settings_in(other))  # type: ignore[operator]
            assert log.name in check_catalog(settings_in(other))[0]
        other.chmod(0o755)
        assert {p.name: p.read_bytes() for p in other.iterdir()} == before
        # Who can write reads all of it.
        assert "built_in" in names(settings_in(other))
        ghosts = raw(other / "catalog.sqlite", "SELECT count(*) FROM cards WHERE name = 'ghost' OR license = 'half'")
        assert ghosts == [(int(leave is leave_a_log),)]


@pytest.mark.few(2)
@pytest.mark.parametrize("door", [check_catalog, lifecycle.backup, lifecycle.upgrade, open_catalog_readonly])
def test_who_can_write_undoes_what_was_left_half_done(tmp_path: Path, settings: Settings, door: object) -> None:
    journal = leave_a_journal(tmp_path / "catalog.sqlite")
    door(settings)  # type: ignore[operator]
    assert not journal.exists()
    assert raw(tmp_path / "catalog.sqlite", "SELECT count(*) FROM cards WHERE license = 'half'") == [(0,)]
    assert check_catalog(settings) == []


def test_a_reader_beside_a_link(tmp_path: Path, settings: Settings) -> None:
    log = leave_a_log(tmp_path / "catalog.sqlite")
    with public_folder() as folder, public_folder() as links:
        for file in (tmp_path / "catalog.sqlite", log):
            shutil.copy(file, folder / file.name)
        (links / "catalog.sqlite").symlink_to(folder / "catalog.sqlite")
        folder.chmod(0o555)
        with nobody(), pytest.raises(CatalogError, match="cannot be read without its log"):
            open_catalog(settings_in(links))
        folder.chmod(0o755)


def test_opening_a_catalog_keeps_the_locks_that_this_process_has_on_it(tmp_path: Path, settings: Settings) -> None:
    """POSIX drops all locks of a process on a file as soon as it closes any descriptor of that file."""
    path = tmp_path / "catalog.sqlite"
    shutil.copy(tmp_path / "backup.sqlite", path)
    raw(path, "PRAGMA journal_mode=DELETE")  # as on network disks: the locks are on the file itself
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        assert target_module.peek(path) is target_module.Found.CATALOG
        script = f"import sqlite3; sqlite3.connect({str(path)!r}, timeout=0).execute('BEGIN IMMEDIATE')"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert "locked" in done.stderr
