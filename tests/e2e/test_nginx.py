"""Files of a real web server, nginx: pulled and read in ranges, resumed, and replaced while they are read."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from lading.errors import FetchError
from lading.sources.cache import Cache
from lading.sources.source import read_bytes
from lading.sources.web.connection import Timeouts
from lading.sources.web.download import Concurrency
from lading.sources.web.source import HttpSource

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
DATA = os.urandom(3 << 20)

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

CONFIG = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors.log;
events {{ worker_connections 64; }}
http {{
    access_log {folder}/requests.log; gzip on; gzip_types *; gzip_min_length 1; sendfile on;
    client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
    uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
    server {{
        listen 127.0.0.1:{port}; root {folder}/files;
        location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
        location /whole/ {{ max_ranges 0; alias {folder}/files/; }}
    }}
}}
"""


@dataclass
class Nginx:
    url: str
    folder: Path

    @property
    def requests(self) -> list[str]:
        return (self.folder / "requests.log").read_text().splitlines()


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    folder = tmp_path_factory.mktemp("nginx")
    (folder / "files").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (folder / "nginx.conf").write_text(CONFIG.format(folder=folder, port=port))
    folder.chmod(0o755)
    assert NGINX is not None
    process = subprocess.Popen([NGINX, "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(500):
            with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.02)
        yield Nginx(f"http://127.0.0.1:{port}", folder)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def file(nginx: Nginx, home: Path) -> Path:
    path = nginx.folder / "files" / "model.safetensors"
    path.write_bytes(DATA)
    os.utime(path, (1_600_000_000, 1_600_000_000))
    return path


def open_source(nginx: Nginx, tmp_path: Path, path: str = "/model.safetensors") -> HttpSource:
    concurrency = Concurrency(connections=4, piece=256 << 10)
    timeouts = Timeouts(attempts=3, backoff=0.01)
    return HttpSource(
        nginx.url + path, cache=Cache(tmp_path), offline=False, concurrency=concurrency, timeouts=timeouts
    )


STATUSES = {"/": {"200", "206"}, "/moved/": {"200", "206", "302"}, "/whole/": {"200"}}


@pytest.mark.parametrize("path", STATUSES)
def test_a_pull(nginx: Nginx, file: Path, tmp_path: Path, path: str) -> None:
    before = len(nginx.requests)
    with open_source(nginx, tmp_path, f"{path}model.safetensors") as source:
        snapshot = source.snapshot()
        assert snapshot.files[0].size == len(DATA)
        (fetched,) = source.fetch(snapshot, snapshot.files, known=lambda _: None, progress=False)

    assert fetched.sha256 == hashlib.sha256(DATA).hexdigest()
    assert fetched.path.read_bytes() == DATA
    assert {line.split('"')[2].split()[0] for line in nginx.requests[before:]} == STATUSES[path]


def test_reads_from_many_threads_share_connections(nginx: Nginx, file: Path, tmp_path: Path) -> None:
    with open_source(nginx, tmp_path) as source, ThreadPoolExecutor(8) as pool:
        snapshot = source.snapshot()
        size = len(DATA) // 64
        parts = pool.map(lambda i: read_bytes(source, snapshot, snapshot.files[0], i * size, size), range(64))
        assert b"".join(parts) == DATA


@pytest.mark.few(1)
@pytest.mark.parametrize("change", ["content", "removed"])
def test_a_file_that_changes_between_two_ranges(nginx: Nginx, file: Path, tmp_path: Path, change: str) -> None:
    with open_source(nginx, tmp_path) as source:
        snapshot = source.snapshot()
        assert read_bytes(source, snapshot, snapshot.files[0], 0, 100) == DATA[:100]
        if change == "content":
            file.write_bytes(DATA[::-1])
            os.utime(file, (1_700_000_000, 1_700_000_000))
            with pytest.raises(FetchError, match="has changed"):
                read_bytes(source, snapshot, snapshot.files[0], 100, 100)
        else:
            file.unlink()
            with pytest.raises(FileNotFoundError):
                read_bytes(source, snapshot, snapshot.files[0], 100, 100)
