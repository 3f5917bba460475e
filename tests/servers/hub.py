"""A hub on loopback that speaks enough of the Hugging Face hub's protocol for the real client to work against it.

Two origins, as there: the hub, and a "CDN" that large files are redirected to and that must never see a token.
Names ending in a suffix of LFS are large files, whatever their size. The protocol is the one that huggingface_hub asks:
https://huggingface.co/docs/hub/api and its own source.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS = (".safetensors", ".bin", ".pt", ".pth")
TOKEN = "hf_a_token_of_the_tests"


@dataclass
class Repository:
    id: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Publish files as a new commit; the ref then names it."""
        text = json.dumps([self.id, {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}])
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit

    def at(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    """What reached a server."""

    origin: str
    """``hub`` or ``cdn``."""
    method: str
    path: str
    authorization: str | None
    range: str | None


class FakeHub:
    """``with FakeHub() as hub: hub.add("org/name", folder)``; ``hub.url`` is its ``HF_ENDPOINT``."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.tokens = {TOKEN}
        """Tokens that are valid; those in ``members`` may read gated and private repositories."""
        self.members = {TOKEN}
        self.after_info: Callable[[], object] | None = None
        """Called once, when the next answer about a repository is on its way: what is published can change then."""
        self.rewrite: Callable[[dict[str, Any]], object] | None = None
        """What changes each answer about a repository, in place."""
        self._faults: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()
        self._hub = _server(self, "hub")
        self._cdn = _server(self, "cdn")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_port}"

    @property
    def cdn_url(self) -> str:
        # Another host than the hub's also by name.
        return f"http://localhost:{self._cdn.server_port}"

    def add(
        self, repo: str, files: Path | Mapping[str, bytes], *, gated: bool = False, private: bool = False
    ) -> Repository:
        """Publish a folder, or files by their names."""
        if isinstance(files, Path):
            folder = files
            files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        found = self.repositories[repo.casefold()] = Repository(id=repo, gated=gated, private=private)
        found.commit(files)
        return found

    def misbehave(self, target: str, fault: str, times: int = 1_000_000) -> None:
        """From now on, so many times, do a thing wrong.

        :param target: the name of a file; or ``info``, for answers about repositories.
        :param fault: ``corrupt`` (one bit), ``short`` (half the body), ``long``, ``ignore-range``, ``wrong-range``,
            ``gzip``, ``html``, ``slow`` (a second late), ``drip`` (takes four), ``loop`` (redirects), ``downgrade`` (a
            redirect to another scheme), ``other-commit``, a status (``503`` …), or ``tag:…`` (that entity tag).
        """
        self._faults[target] = (fault, times)

    def behave(self) -> None:
        """Like a hub again, with the requests forgotten."""
        self._faults.clear()
        self.requests.clear()
        self.after_info = self.rewrite = None

    def fault(self, target: str) -> str | None:
        with self._lock:
            fault, times = self._faults.get(target, ("", 0))
            if not times:
                return None
            self._faults[target] = (fault, times - 1)
            return fault

    def peek(self, target: str) -> str | None:
        fault, times = self._faults.get(target, ("", 0))
        return fault if times else None

    def counted(self) -> Counter[tuple[str, str]]:
        """How many requests of each method reached each origin."""
        return Counter((r.origin, r.method) for r in self.requests)

    def __enter__(self) -> FakeHub:
        for server in (self._hub, self._cdn):
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith(LFS)


def _server(hub: FakeHub, origin: str) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"hub": hub, "origin": origin})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # clients hang up on purpose
    return server


class _Answered(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub
    origin: str

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._route()

    def _route(self) -> None:
        self.hub.requests.append(
            Request(self.origin, self.command, self.path, self.headers.get("Authorization"), self.headers.get("Range"))
        )
        with contextlib.suppress(_Answered):
            parts = [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]
            if self.origin == "cdn":
                self._cdn(parts)
            elif parts[:2] == ["api", "models"]:
                self._api(parts[2:])
            else:
                self._resolve(parts)

    # --- answers -----------------------------------------------------------------------------------------------------

    def _send(self, status: int, body: bytes = b"", *, drip: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            step = max(len(body) // 40, 1) if drip else len(body) or 1
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                time.sleep(0.1 if drip else 0)
        raise _Answered

    def _fail(self, status: int, code: str | None = None, message: str = "") -> None:
        headers = {} if code is None else {"X_Error_Code": code}
        if message:
            headers["X_Error_Message"] = message
        self._send(status, json.dumps({"error": message}).encode(), Content_Type="application/json", **headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _plain_fault(self, fault: str | None) -> None:
        """The faults that an answer to anything can have."""
        if fault == "html":
            self._send(200, b"<html>Please log in to this network</html>", Content_Type="text/html")
        elif fault == "loop":
            self._send(302, Location=self.hub.url + self.path)
        elif fault == "slow":
            time.sleep(1)
        elif fault is not None and fault.isdecimal():
            self._fail(int(fault))

    # --- the hub -----------------------------------------------------------------------------------------------------

    def _take_repository(self, parts: list[str]) -> tuple[Repository, str, list[str]]:
        """The repository that a path begins with, as it is spelled there, and the rest of the path."""
        for count in (2, 1):
            spelled = "/".join(parts[:count])
            found = self.hub.repositories.get(spelled.casefold())
            if found is not None and len(parts) >= count:
                break
        else:
            found = None

        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            self._fail(401, None, "Invalid credentials in Authorization header")
        if found is None or (found.private and token not in self.hub.members):
            # The answer does not tell whether a private one is there.
            self._fail(404 if token else 401, "RepoNotFound", "Repository not found")
        assert found is not None
        return found, spelled, parts[count:]

    def _may_read(self, repo: Repository) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repo.gated and token not in self.hub.members:
            self._fail(403 if token else 401, "GatedRepo", f"Access to model {repo.id} is restricted.")

    def _api(self, parts: list[str]) -> None:
        repo, spelled, rest = self._take_repository(parts)
        self._plain_fault(self.hub.fault("info"))
        if spelled != repo.id:
            self._send(307, Location=self.path.replace(f"/{spelled}", f"/{repo.id}", 1))

        kind = rest[0] if rest else "revision"
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repo.at(revision)
        if commit is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = repo.commits[commit]
        query = parse_qs(urlsplit(self.path).query)

        if kind == "revision":
            siblings = [_sibling(name, data, "blobs" in query) for name, data in files.items()]
            answer = {"_id": "0", "id": repo.id, "sha": commit, "private": repo.private, "gated": repo.gated}
            answer["siblings"] = siblings
            if self.hub.rewrite is not None:
                self.hub.rewrite(answer)
            if self.hub.after_info is not None:
                change, self.hub.after_info = self.hub.after_info, None
                change()
            self._json(answer)
        elif kind == "tree":
            under = "/".join(rest[2:])
            self._json([_entry(n, d) for n, d in files.items() if not under or n.startswith(f"{under}/")])
        elif kind == "paths-info":
            wanted = set(json.loads(self._body)["paths"])
            self._json([_entry(n, d) for n, d in files.items() if n in wanted])
        else:
            self._fail(404)

    def _resolve(self, parts: list[str]) -> None:
        repo, spelled, rest = self._take_repository(parts)
        if rest[:1] != ["resolve"] or len(rest) < 3:
            self._fail(404)
        if spelled != repo.id:
            self._send(307, Location=self.path.replace(f"/{spelled}", f"/{repo.id}", 1))
        self._may_read(repo)

        revision, name = rest[1], "/".join(rest[2:])
        commit = repo.at(revision)
        if commit is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        data = repo.commits[commit].get(name)
        if data is None:
            self._send(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=commit)
            return

        fault = self.hub.peek(name)
        headers = {"X_Repo_Commit": "f" * 40 if fault == "other-commit" else commit}
        tag = fault.removeprefix("tag:") if fault and fault.startswith("tag:") else None
        if fault in {"loop", "html", "slow"} or (fault and fault.isdecimal()):
            self._plain_fault(self.hub.fault(name))
        if fault == "downgrade":
            self._send(302, Location=f"ftp://localhost/{quote(name)}", **headers)
        if is_large(name):
            sha256 = hashlib.sha256(data).hexdigest()
            headers["X_Linked_Etag"] = f'"{tag or sha256}"'
            headers["X_Linked_Size"] = str(len(data))
            place = f"{self.hub.cdn_url}/{repo.id}/{commit}/{quote(name)}?signed=yes"
            self._send(302, Location=place, ETag=f'"{git_blob(data)}"', **headers)
        self._bytes(name, data, ETag=f'"{tag or git_blob(data)}"', **headers)

    # --- bytes -------------------------------------------------------------------------------------------------------

    def _cdn(self, parts: list[str]) -> None:
        if self.headers.get("Authorization") is not None:
            self._fail(400, None, "a signed address needs no token")
        # org/name/commit/path, or name/commit/path
        for count in (2, 1):
            repo = self.hub.repositories.get("/".join(parts[:count]).casefold())
            if repo is not None:
                break
        else:
            self._fail(404)
            return
        name = "/".join(parts[count + 1 :])
        self._bytes(name, repo.commits[parts[count]][name], ETag='"of-the-storage-7"')

    def _bytes(self, name: str, data: bytes, **headers: str) -> None:
        fault = self.hub.fault(name) if self.command == "GET" else None
        self._plain_fault(fault)
        if fault == "corrupt" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])

        status, body = 200, data
        wanted = self.headers.get("Range")
        if wanted is not None and fault != "ignore-range":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last), len(data) - 1) if last else len(data) - 1
            if start >= len(data):
                self._send(416, Content_Range=f"bytes */{len(data)}")
            status, body = 206, data[start : end + 1]
            shift = 1 if fault == "wrong-range" else 0
            headers["Content_Range"] = f"bytes {start + shift}-{end + shift}/{len(data)}"
        if fault == "gzip":
            body = gzip.compress(body)
            headers["Content_Encoding"] = "gzip"
        if fault == "long":
            body += b"more"
        headers["Content_Length"] = str(len(body))
        if fault == "short":
            body = body[: len(body) // 2]
            self.close_connection = True
        self._send(status, body, drip=fault == "drip", **headers)


def _sibling(name: str, data: bytes, blobs: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": name}
    if blobs:
        found |= {"size": len(data), "blobId": git_blob(data)}
        if is_large(name):
            found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found


def _entry(name: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_blob(data)}
    if is_large(name):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found
