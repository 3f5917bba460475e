"""A process that uses the real huggingface_hub against a hub on loopback, told what to do from the test.

huggingface_hub reads its environment when it is imported, so it needs a process of its own; importing it takes half a
second, so many tests share one.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any


class HubClient:
    """``client("result = HubSource(uri).snapshot()", uri=…)`` runs there; what it raises is raised here."""

    def __init__(self, endpoint: str, home: Path) -> None:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "LADING_", "HUGGINGFACE_"))}
        stderr = (home / "stderr").open("wb")
        self._stderr = (home / "stderr").open("rb")
        self.cache = home / "hub"
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__],
            env={**keep, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        stderr.close()

    def __call__(self, code: str, *, token: str | None = None, cache: Path | None = None, **names: object) -> Any:
        """What ``code`` left in ``result``.

        :param cache: the cache of this call, instead of the one of the process.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((code, token, str(cache or self.cache), names), self._process.stdin)
        self._process.stdin.flush()
        good, value = pickle.load(self._process.stdout)
        if not good:
            raise value
        return value

    def stderr(self) -> str:
        """What was written since this was last asked."""
        return self._stderr.read().decode()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            assert pipe is not None
            pipe.close()


def main() -> None:
    import traceback

    from huggingface_hub import constants

    from lading.sources import source
    from lading.sources.hub import cache as hf_cache
    from lading.sources.hub import client as hf_client
    from lading.sources.hub import errors as hf_errors
    from lading.sources.hub import files as hf_files
    from lading.sources.hub import source as hf
    from lading.sources.web.connection import Timeouts

    hf_errors.BACK_OFF = 0.01
    Timeouts.__init__.__kwdefaults__.update(backoff=0.01, max_wait=0.05)  # type: ignore[misc]
    pipe, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            code, token, cache, names = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        constants.HF_HUB_CACHE = cache
        os.environ.pop("HF_TOKEN", None)
        if token is not None:
            os.environ["HF_TOKEN"] = token
        known = {**vars(source), **vars(hf_cache), **vars(hf_files), **vars(hf_client), **vars(hf)}
        room: dict[str, Any] = {**known, "constants": constants, "os": os, **names}
        try:
            exec(code, room)
            answer = (True, room.get("result"))
        except Exception as error:
            traceback.print_exc()
            answer = (False, error)
        pipe.write(pickle.dumps(answer))
        pipe.flush()


if __name__ == "__main__":
    main()
