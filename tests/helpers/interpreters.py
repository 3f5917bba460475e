"""Python in processes of its own that have torch imported, and nothing else of what tests import.

A server imports torch once and forks for each piece of code, which spares it most of what a new interpreter costs. What
else the code needs it imports itself, in the environment that it is given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Interpreters:
    """``run(code, *arguments)`` is ``python -c code arguments``, but for torch."""

    def __init__(self, folder: Path) -> None:
        self._files = [str(folder / kind) for kind in ("out", "err")]
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, code: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """Return what code prints, which must not fail.

        :param env: instead of the environment of this process.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        environment = dict(os.environ if env is None else env)
        print(json.dumps([code, arguments, environment, self._files]), file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())
        out, err = (Path(file).read_text() for file in self._files)
        assert status == 0, err

        return out

    def close(self) -> None:
        self._server.communicate()


def _run(code: str, arguments: list[str], environment: dict[str, str], files: list[str]) -> None:
    for fd, path in enumerate(files, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, fd)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(code, names)


def main() -> None:
    import traceback

    import torch  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _run(*json.loads(line))
                status = 0
            except SystemExit as error:
                print(error, file=sys.stderr)
                status = int(bool(error.code))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
