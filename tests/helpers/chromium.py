"""A headless Chromium, driven over its debugging pipe: https://chromedevtools.github.io/devtools-protocol/"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Tab:
    """A page of a browser."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._pending = b""
        self._count = 0
        self._session: str | None = None
        self._loaded = False
        self.requested: list[str] = []
        """The addresses of all requests of all pages, in their order."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")
        self._call("Network.enable")

    def open(self, url: str) -> None:
        """Go to an address, and wait until the page and its frames are loaded."""
        self._loaded = False
        failed = self._call("Page.navigate", url=url).get("errorText")
        assert failed is None, f"{url}: {failed}"
        self.wait_until_loaded()

    def act(self, expression: str) -> None:
        """Evaluate JavaScript that leads to another page, and wait for that."""
        self._loaded = False
        self.evaluate(expression)
        self.wait_until_loaded()

    def wait_until_loaded(self, patience_s: float = 60.0) -> None:
        end = time.monotonic() + patience_s
        while not self._loaded:
            self._take(end)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """Return the text of all elements that a CSS selector finds."""
        script = f"Array.from(document.querySelectorAll({json.dumps(selector)}), e => e.textContent.trim())"
        found: list[str] = self.evaluate(script)

        return found

    def screenshot(self, path: Path) -> None:
        import base64

        data = self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _call(self, method: str, **params: object) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while (answer := self._take(end)).get("id") != self._count:
            pass
        assert "error" not in answer, answer

        return dict(answer["result"])

    def _take(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser ended"
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if message.get("method") == "Network.requestWillBeSent":
            self.requested.append(message["params"]["request"]["url"])
        elif message.get("method") == "Page.loadEventFired":
            self._loaded = True

        return message


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """Run a browser with an empty profile."""
    assert CHROMIUM is not None
    inward, outward = os.pipe(), os.pipe()
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,900",
        f"--user-data-dir={profile}", "--remote-debugging-pipe",
    ]  # fmt: skip
    # Chromium reads commands from its file 3, and answers to its file 4.
    shell = ["bash", "-c", f'exec "$@" 3<&{inward[0]} 4>&{outward[1]}', "bash", *command]
    process = subprocess.Popen(
        shell, pass_fds=(inward[0], outward[1]), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(inward[0])
    os.close(outward[1])
    try:
        yield Tab(outward[0], inward[1])
    finally:
        process.kill()
        process.wait()
        os.close(outward[0])
        os.close(inward[1])
