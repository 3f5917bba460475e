"""A PostgreSQL server for the tests alone, in a temporary folder and over a socket in it, so that it meets no other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.helpers.catalog_tools import make_without_rows

if TYPE_CHECKING:
    import psycopg

_USER = "lading"
_PATIENCE_S = 60.0


def find_programs() -> Path | None:
    """Return the folder of ``initdb`` and ``postgres``; ``None`` where they are not installed."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)

    return next((folder for folder in folders if (folder / "postgres").exists()), None)


_SHAPE = """
SELECT string_agg(kind || ' ' || id || ' ' || changed, ',' ORDER BY kind, id, changed) FROM (
    SELECT 'class' kind, oid::text id, xmin::text changed FROM pg_class WHERE relnamespace = 'public'::regnamespace
    UNION ALL SELECT 'column', attrelid || ' ' || attnum, a.xmin::text FROM pg_attribute a
        JOIN pg_class c ON c.oid = attrelid WHERE relnamespace = 'public'::regnamespace
    UNION ALL SELECT 'check', oid::text, xmin::text FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    UNION ALL SELECT 'rule', r.oid::text, r.xmin::text FROM pg_rewrite r
        JOIN pg_class c ON c.oid = ev_class WHERE relnamespace = 'public'::regnamespace
) shape
"""
"""The objects of a schema and the transactions that changed them last, which copies of a database have in common."""

_CLEAR = """
DO $$
DECLARE name text;
BEGIN
    SET LOCAL session_replication_role = replica;  -- in any order
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'lading_version' LOOP
        EXECUTE format('DELETE FROM %I', name);
    END LOOP;
    PERFORM setval(format('%I', sequencename)::regclass, 1, false) FROM pg_sequences WHERE schemaname = 'public';
END $$
"""

_END_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


class Server:
    """A server that runs, and its databases, which begin as catalogs without rows.

    To make a database takes a tenth of a second, so they are used again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spare: list[str] = []
        self._count = 0
        self._shape: Any = None

    @contextmanager
    def databases(self) -> Iterator[Callable[[Path], str]]:
        """Give the URL of the database that stands for a folder, which is there from when it is first asked for."""
        used: dict[Path, str] = {}

        def url(folder: Path) -> str:
            if folder not in used:
                used[folder] = self._spare.pop() if self._spare else self._copy()

            return self._url(used[folder])

        try:
            yield url
        finally:
            for name in used.values():
                self._take_back(name)

    def empty(self, name: str) -> str:
        """Return the URL of a new database with nothing in it, not even a schema."""
        self._ask(f"CREATE DATABASE {name}")

        return self._url(name)

    def _copy(self) -> str:
        if self._shape is None:
            make_without_rows(self.empty("template"))
            self._shape = self._ask(_SHAPE, "template")
        self._count += 1
        name = f"t{self._count}"
        with self._connect("postgres") as connection:
            # As files: what version 15 and later do unless told otherwise writes all of it to the log besides.
            strategy = "STRATEGY file_copy" if connection.info.server_version >= 150000 else ""
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template {strategy}")  # type: ignore[call-overload]

        return name

    def _take_back(self, name: str) -> None:
        """Take all rows out of a database; drop it if its schema has changed."""
        with self._connect(name) as connection:
            connection.execute(_END_OTHERS)
            is_as_before = connection.execute(_SHAPE).fetchall() == self._shape
            if is_as_before:
                connection.execute(_CLEAR)
        if is_as_before:
            self._spare.append(name)
        else:
            self._ask(f"DROP DATABASE {name} WITH (FORCE)")

    def _url(self, name: str) -> str:
        return f"postgresql+psycopg://{_USER}@/{name}?host={self._folder}"

    def _connect(self, name: str) -> psycopg.Connection[Any]:
        import psycopg

        return psycopg.connect(f"host={self._folder} user={_USER} dbname={name}", autocommit=True)

    def _ask(self, sql: str, name: str = "postgres") -> Any:
        with self._connect(name) as connection:
            cursor = connection.execute(sql)  # type: ignore[call-overload]

            return cursor.fetchall() if cursor.description else None

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until the server answers."""
        import psycopg

        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                self._ask("SELECT 1")
                return
            except psycopg.OperationalError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


@contextmanager
def running(programs: Path) -> Iterator[Server]:
    """Start a server, which keeps nothing safe and ends with the body."""
    # Not a folder of pytest's: the path of a socket has at most 107 characters, and other users must reach it.
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        rights: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            rights = {"user": 65534, "group": 65534, "extra_groups": ()}
            os.chown(folder, 65534, 65534)
        data = folder / "data"
        init = [programs / "initdb", "-D", data, "-U", _USER, "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL, cwd=folder, **rights)
        quick = [f"-c{name}=off" for name in ("fsync", "synchronous_commit", "full_page_writes", "jit", "autovacuum")]
        quick += ["-cshared_buffers=16MB", "-cwal_level=minimal", "-cmax_wal_senders=0"]
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen(
                [programs / "postgres", "-D", data, "-k", folder, "-h", "", *quick],
                stdout=log, stderr=log, cwd=folder, **rights,
            ) as process,
        ):  # fmt: skip
            try:
                server = Server(folder)
                server.wait(process)
                yield server
            finally:
                process.send_signal(signal.SIGINT)  # ends connections, too
