"""File systems whose files cannot be locked, as on a server without a lock daemon."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from pathlib import Path

import pytest

from lading.catalog.database.failures import sqlite_failure
from lading.catalog.database.target import Target
from lading.errors import CatalogError
from lading.operations.atomic_folder import atomic_folder


def sqlite_error(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("what SQLite says")
    error.sqlite_errorcode = code
    return error


@pytest.fixture(params=["ENOLCK", "EIO", "ENOTSUP"])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    code = getattr(errno, request.param)

    def fails(fd: object, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", fails)
    monkeypatch.setattr(fcntl, "flock", fails)
    return os.strerror(code)


@pytest.mark.parametrize("code", [sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR_LOCK])
def test_a_catalog_says_so_and_names_the_way_out(tmp_path: Path, without_locks: str, code: int) -> None:
    error = sqlite_failure(sqlite_error(code), Target.from_url(f"sqlite:///{tmp_path}/c.sqlite"))
    assert isinstance(error, CatalogError)
    for part in ("cannot be locked", without_locks, str(tmp_path), "LADING_DATABASE_URL"):
        assert part in str(error)


@pytest.mark.parametrize("code", [sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR_LOCK])
def test_where_there_are_locks_it_is_something_else(tmp_path: Path, code: int) -> None:
    error = sqlite_failure(sqlite_error(code), Target.from_url(f"sqlite:///{tmp_path}/c.sqlite"))
    assert "cannot be locked" not in str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_needs_no_locks(tmp_path: Path, without_locks: str) -> None:
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "file").write_text("x")
    assert (tmp_path / "out" / "file").read_text() == "x"
