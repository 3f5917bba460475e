"""A PostgreSQL server for the tests alone, in a temporary folder and over a socket in it, so that it meets no other."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_USER = "lading"
_PATIENCE_S = 60.0


def find_programs() -> Path | None:
    """Return the folder of ``initdb`` and ``postgres``; ``None`` where they are not installed."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)

    return next((folder for folder in folders if (folder / "postgres").exists()), None)


class Server:
    """A server that runs, and its databases: one for each folder that a catalog is asked for in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: set[str] = set()

    def url(self, folder: Path) -> str:
        """Return the URL of the database that stands for ``folder``, which is made when it is first asked for."""
        name = f"t{hashlib.sha256(os.fsencode(folder)).hexdigest()[:20]}"
        if name not in self._made:
            self._ask(f"CREATE DATABASE {name}")
            self._made.add(name)

        return f"postgresql+psycopg://{_USER}@/{name}?host={self._folder}"

    def forget(self) -> None:
        """Drop all databases that were made."""
        for name in self._made:
            self._ask(f"DROP DATABASE {name} WITH (FORCE)")
        self._made.clear()

    def _ask(self, sql: str) -> None:
        import psycopg

        with psycopg.connect(f"host={self._folder} user={_USER} dbname=postgres", autocommit=True) as connection:
            connection.execute(sql)  # type: ignore[call-overload]

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until the server answers."""
        import psycopg

        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self._ask("SELECT 1")
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
        quick = [f"-c{name}=off" for name in ("fsync", "synchronous_commit", "full_page_writes")]
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
