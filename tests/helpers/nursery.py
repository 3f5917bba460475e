"""Command lines in processes of their own that begin at once, and that can be killed and kept short of things.

A process has imported everything, and forks for each command line: to start one costs some hundredths of a second
instead of a second or more. One nursery serves all tests of a worker: each command line brings its own environment.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

MARK = "lading: "
"""What every line of lading on stderr begins with."""


@dataclass(frozen=True)
class Ended:
    """A command line that has ended."""

    code: int
    """Negative: the signal that ended it."""
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines on stderr, without the warnings."""
        return [line for line in self.err.splitlines() if not line.startswith(f"{MARK}warning: ")]


class Nursery:
    """``nursery.run(["pull", "far"], env)`` is ``lading pull far`` in this environment; after ``-c`` comes Python."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._errors = (folder / "errors").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__],
            env={**clean_environment(), "HOME": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it has imported everything

    def start(
        self,
        words: Sequence[str | Path],
        env: Mapping[str, str],
        *,
        cwd: Path | None = None,
        at: float = 0.0,
        stdin: str | Path = os.devnull,
        merged: bool = False,
        **ways: Any,
    ) -> Child:
        """Begin a command line.

        :param env: the whole environment.
        :param at: by the clock of all processes.
        :param merged: what is written on stderr is in ``out``, as it would be on a terminal.
        :param ways: names and values of :data:`WAYS`.
        """
        self._count += 1
        files = [self._folder / f"{self._count}.{kind}" for kind in ("out", "err")]
        for file in files:  # a process may be killed before it opens them
            file.touch()
        pid = self._ask(
            words=[str(w) for w in words],
            env=dict(env),
            cwd=str(cwd or Path.cwd()),
            at=at,
            files=[str(stdin), str(files[0]), str(files[0 if merged else 1])],
            ways=ways,
        )

        return Child(self, pid, *files)

    def run(self, words: Sequence[str | Path], env: Mapping[str, str], **ways: Any) -> Ended:
        return self.start(words, env, **ways).wait()

    def wait(self, pid: int) -> int:
        return self._ask(wait=pid)

    def close(self) -> None:
        self._process.communicate()
        self._errors.seek(0)
        errors = self._errors.read()
        self._errors.close()
        assert not errors, errors

    def _ask(self, **command: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def clean_environment() -> dict[str, str]:
    """The environment of this process without what the libraries, and lading, read from it."""
    dropped = ("HF_", "LADING_", "HUGGINGFACE_", "XDG_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NETRC")
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(dropped)}


class Child:
    def __init__(self, nursery: Nursery, pid: int, out: Path, err: Path) -> None:
        self.pid = pid
        self._nursery = nursery
        self._files = (out, err)

    def said(self) -> str:
        """What it has written on stdout so far."""
        return self._files[0].read_text()

    def complained(self) -> str:
        """Return the text that it has written on stderr so far."""
        return self._files[1].read_text()

    def runs(self) -> bool:
        """Return True unless it has ended; it is a zombie until it is waited for."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> Ended:
        """SIGKILL, whether or not it has ended by itself; a process that has is not reaped before it is waited for."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> Ended:
        code = self._nursery.wait(self.pid)
        out, err = (file.read_text() for file in self._files)
        for file in self._files:
            file.unlink()

        return Ended(code, out, err)


# --- ways in which a process can be hampered, each done in the child -------------------------------------------------


def _killed_at(number: int) -> None:
    """SIGKILL just before the call number so-and-so that changes a file, opens one to write, or connects."""
    names = {"os.rename", "os.remove", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink", "os.utime"}
    names |= {"sqlite3.connect", "socket.connect"}
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 0:
            os.write(_COUNTED, b".")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in names or (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            step()

    def stepping(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            step()
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "fdatasync", "pwrite", "ftruncate", "fchmod"):
        setattr(os, name, stepping(getattr(os, name)))
    sys.addaudithook(hook)


_COUNTED = 9
"""The file to which a child that is not killed writes a byte for each call."""


def _counted(path: str) -> None:
    """Count the calls of :func:`_killed_at` in the size of a file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, _COUNTED)
    os.close(fd)
    _killed_at(0)


def _impatient(_: object) -> None:
    """Give up on a web server that is slow after a moment: for what waits in vain in any case."""
    from lading.sources.web.connection import Timeouts

    haste = {"connect": 5, "answer": 0.6, "silence": 0.3, "window": 0.4, "attempts": 2}
    Timeouts.__init__.__kwdefaults__.update(haste)  # type: ignore[misc]


def _no_locks(_: object) -> None:
    import fcntl

    fcntl.flock = lambda fd, how: None


def _small_files(limit: int) -> None:
    """Limit the size of files to ``limit`` bytes; a full disk has another errno."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def _bound_by_permissions(_: object) -> None:
    """Give up what lets root pass over permissions."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of capset(2), this process
    none = (ctypes.c_uint32 * 6)()
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def _mounted_read_only(folders: list[str]) -> None:
    """See ``folders`` through mounts that cannot be written, in a name space of this process."""
    for folder in folders:
        mount("bind", folder, folder, _MS_BIND)
        mount("bind", folder, folder, _MS_BIND | _MS_REMOUNT | _MS_RDONLY)


WAYS: dict[str, Callable[[Any], None]] = {
    "killed_at": _killed_at,
    "counted": _counted,
    "impatient": _impatient,
    "no_locks": _no_locks,
    "small_files": _small_files,
    "bound_by_permissions": _bound_by_permissions,
    "mounted_read_only": _mounted_read_only,
}

# --- mounts ----------------------------------------------------------------------------------------------------------

# <sys/mount.h> and <sched.h>
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_CLONE_NEWNS = 0x20000


def mount(kind: str, source: str | Path, target: str | Path, flags: int = 0, data: str = "") -> None:
    """mount(2), in a name space of this process alone.

    :raises PermissionError: this process may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not _own_mounts:
        if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
            raise OSError(ctypes.get_errno(), "unshare")
        _own_mounts.append(True)
    words = [os.fsencode(word) for word in (source, target, kind)]
    if libc.mount(*words, flags, os.fsencode(data) or None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


_own_mounts: list[bool] = []


@lru_cache(maxsize=1)
def may_mount() -> bool:
    """Return True if a process here can have mounts of its own."""
    code = "import sys; from tests.helpers import nursery; nursery.mount('tmpfs', 'none', sys.argv[1], 0, 'size=64k')"
    done = subprocess.run(
        [sys.executable, "-c", code, "/tmp"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


# --- the nursery itself ----------------------------------------------------------------------------------------------


def _live(command: dict[str, Any]) -> None:
    from huggingface_hub import constants

    from lading.cli import main as lading

    for fd, path in enumerate(command["files"]):
        file = os.open(path, os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(file, fd)
        os.close(file)
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["env"])
    importlib.reload(constants)  # which reads the environment
    for name, value in command["ways"].items():
        WAYS[name](value)
    time.sleep(max(0.0, command["at"] - time.monotonic()))
    if command["words"][:1] == ["-c"]:
        _, code, *sys.argv[1:] = command["words"]
        exec(code, {})
    else:
        sys.argv = ["lading", *command["words"]]
        lading()


def _code_of(command: dict[str, Any]) -> int:
    try:
        _live(command)
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException as error:
        traceback.print_exc()
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1

    return 0


def _import_all() -> None:
    """Import what a command line may need, and what is imported or made at its first use only."""
    import huggingface_hub
    import huggingface_hub.file_download
    import pydantic
    import urllib3  # noqa: F401
    from sqlalchemy.orm import configure_mappers

    import lading
    from lading.system.entry_points import registered

    for module in pkgutil.walk_packages(lading.__path__, "lading."):
        if not module.name.startswith(("lading.__main__", "lading.migrations.")):
            importlib.import_module(module.name)
    configure_mappers()
    huggingface_hub.HfApi()
    # Both look into a file of each installed package.
    registered("")
    pydantic.TypeAdapter(int)


def _hurry() -> None:
    """Wait less: what a person waits for is not what a test can wait for."""
    import types

    import huggingface_hub.file_download
    import huggingface_hub.utils._http

    from lading.sources.hub import errors as hf_errors
    from lading.sources.web.connection import Timeouts

    hf_errors.BACK_OFF = 0.01
    Timeouts.__init__.__kwdefaults__.update(attempts=3, backoff=0.01, max_wait=0.05)  # type: ignore[misc]
    hasty = types.SimpleNamespace(**vars(time) | {"sleep": lambda seconds: time.sleep(seconds / 100)})
    for client in (huggingface_hub.file_download, huggingface_hub.utils._http):
        vars(client)["time"] = hasty


def main() -> None:
    import warnings

    _import_all()
    _hurry()
    # The client looks at the disk too, a moment later, when it may be fuller.
    warnings.filterwarnings("default", "Not enough free disk space")
    for each in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        each.atexit = False  # what torch would take back takes a child half of its time
    gc.collect()
    gc.freeze()  # so that the memory of the children stays shared

    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            print(os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _code_of(command)
                # The end of an interpreter, which waits for threads, but for the time that it takes it to clean up.
                threading._shutdown()
                atexit._run_exitfuncs()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                if code == -signal.SIGINT:
                    signal.signal(signal.SIGINT, signal.SIG_DFL)
                    os.kill(os.getpid(), signal.SIGINT)
                os._exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
