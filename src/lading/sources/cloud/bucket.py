"""A bucket of an object store, as obstore opens it: credentials, listing, signed URLs, reads and writes.

The environment names the credentials, the endpoint and the region, by the conventions of each cloud's own tools. They
appear neither in messages nor in anything that lading writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from lading.errors import (
    CheckpointNotFoundError,
    FetchError,
    LadingError,
    NotSupportedError,
    PolicyError,
    SettingsError,
)
from lading.sources.cloud.address import CloudAddress
from lading.sources.cloud.calls import Calls
from lading.sources.hub.address import is_file_name
from lading.sources.source import RemoteFile
from lading.sources.web.redirects import is_loopback
from lading.sources.web.responses import printable
from lading.system.uris import without_secrets

if TYPE_CHECKING:
    from obstore.store import ObjectStore

VALID = timedelta(hours=1)
"""The time for which a signed URL is valid, unless the credentials expire earlier."""

MAX_FILES = 100_000
"""The most objects in a folder; the largest published checkpoints have some thousand."""

_PART = 16 << 20
"""The bytes of a part of an upload."""
_MAX_PARTS = 10_000
"""The most parts of an object: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html."""

_ANSWER = timedelta(minutes=1)
"""The most time of a request that reads: a list, a description, or some MiB of an object."""
_UPLOAD = timedelta(minutes=5)
"""The most time of a request that sends a part of an upload, on a slow line."""

_END = 4.0
"""The most seconds in which a part of an upload ends after Ctrl-C, and then the upload."""

_PARALLEL_PARTS = 6
"""The parts of an object that are sent at a time, which are in memory."""

_ENDPOINTS: Mapping[str, Sequence[str]] = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_SKIP_SIGNATURE: Mapping[str, Sequence[str]] = {
    "s3": ("AWS_SKIP_SIGNATURE",),
    "gs": ("GOOGLE_SKIP_SIGNATURE",),
    "az": ("AZURE_SKIP_SIGNATURE", "AZURE_STORAGE_SKIP_SIGNATURE"),
}
_TRUE = ("1", "true", "yes", "y", "on")
_ANY_KEYS: Mapping[str, Mapping[str, str]] = {
    "s3": {"access_key_id": "any", "secret_access_key": "any", "skip_signature": "false"},
    "az": {"account_key": "YW55", "skip_signature": "false"},
}
_ADVICE: Mapping[str, str] = {
    "s3": (
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, if there is one): for a profile, "
        '`eval "$(aws configure export-credentials --format env)"`; for a public bucket, AWS_SKIP_SIGNATURE=true'
    ),
    "gs": (
        "Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT "
        "to the file of a key; for a public bucket, GOOGLE_SKIP_SIGNATURE=true"
    ),
    "az": (
        "Set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN; for a public "
        "container, AZURE_SKIP_SIGNATURE=true"
    ),
}

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_REGION = re.compile(r"<Region>([a-z0-9-]{1,40})</Region>|<Endpoint>[^<]*\.s3[.-]([a-z0-9-]{1,40})\.amazonaws")
_NO_CREDENTIALS = re.compile(
    r"169\.254\.|metadata\.google|computeMetadata|token request|Account must be specified|Missing(?:Account| Cred)"
)
_OTHER_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed"}


def require_obstore() -> None:
    """Require the package that reads object stores.

    :raises NotSupportedError: it is not installed.
    """
    if find_spec("obstore") is None:
        raise NotSupportedError(
            "Addresses that begin with s3://, gs:// or az:// are read by the package obstore, which is not installed: "
            "`pip install 'lading-hub[cloud]'`."
        )


class Bucket:
    """A bucket of S3 or GCS, or a container of Azure. Its methods are safe to call from several threads."""

    def __init__(self, address: CloudAddress) -> None:
        """Open the bucket of ``address`` without a request.

        :raises NotSupportedError: obstore is not installed.
        :raises PolicyError: the endpoint would be asked over plain http.
        :raises SettingsError: a variable of the environment is not valid.
        """
        require_obstore()
        self.uri = f"{address.scheme}://{address.bucket}"
        self._scheme = address.scheme
        self._bucket = address.bucket
        self._allow_http = _check_endpoint(address.scheme)
        self._obstore = import_module("obstore")
        self._calls = Calls()

    def close(self) -> None:
        """End the calls in progress in other threads."""
        self._calls.end()

    @cached_property
    def _store(self) -> ObjectStore:
        return self._open(_ANSWER)

    @cached_property
    def _uploads(self) -> ObjectStore:
        return self._open(_UPLOAD)

    def _open(self, timeout: timedelta, **credentials: str) -> ObjectStore:
        """:param timeout: the most time of a request, from its connection to the end of its answer."""
        store = self._obstore.store
        kind = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}[self._scheme]
        with self._translated(""):
            return kind(  # type: ignore[no-any-return]
                self._bucket,
                client_options={
                    "allow_http": self._allow_http,
                    "connect_timeout": timedelta(seconds=15),
                    "timeout": timeout,
                },
                # Without credentials, their lookup on a machine outside of a cloud has to end soon.
                retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=60)},
                **credentials,
            )

    # --- reading -----------------------------------------------------------------------------------------------------

    def files(self, folder: str) -> list[RemoteFile]:
        """Return the objects below a folder, by their keys relative to it, sorted.

        Keys that are not paths of plain names are left out.

        :raises CheckpointNotFoundError: the bucket does not exist.
        :raises FetchError: it cannot be listed, or has too many objects there.
        :raises PolicyError: the store refuses the credentials.
        """
        prefix = folder and f"{folder}/"
        found: list[RemoteFile] = []

        async def collect() -> None:
            async for batch in self._store.list(folder or None, chunk_size=1000):
                for each in batch:
                    name = each["path"].removeprefix(prefix)
                    if each["path"].startswith(prefix) and is_file_name(name):
                        found.append(RemoteFile(name=name, size=each["size"], etag=_strong(each["e_tag"])))
                if len(found) > MAX_FILES:
                    raise FetchError(
                        f"{self._where(folder)}: expected the folder of a checkpoint, found more than {MAX_FILES} "
                        "objects. Name the folder itself."
                    )

        with self._translated(folder):
            self._calls.run(collect)

        return sorted(found, key=lambda file: file.name)

    def describe(self, key: str, name: str) -> RemoteFile:
        """Return the object with this key, by the name ``name``.

        :raises CheckpointNotFoundError: the bucket has no such object.
        :raises FetchError: the store cannot be reached.
        :raises PolicyError: it refuses the credentials.
        """
        with self._translated(key):
            head = self._calls.run(self._obstore.head_async, self._store, key)

        return RemoteFile(name=name, size=head["size"], etag=_strong(head["e_tag"]))

    def url(self, key: str) -> str | None:
        """Return a URL by which anyone can get an object for a while; ``None`` if these credentials cannot sign it.

        Some users of GCS and Azure cannot sign; their objects are read by :meth:`read`. The URL of a public object is
        not signed.

        :raises PolicyError: no credentials were found.
        """
        public = any(os.environ.get(name, "").lower() in _TRUE for name in _SKIP_SIGNATURE[self._scheme])
        if public and self._scheme == "gs":
            base = os.environ.get("GOOGLE_BASE_URL") or "https://storage.googleapis.com"
            return f"{base.rstrip('/')}/{self._bucket}/{quote(key, safe='/~')}"
        if public:
            with self._translated(key):
                # Any keys give the address; its signature is cut off.
                store = self._open(_ANSWER, **_ANY_KEYS[self._scheme])
                url: str = self._calls.run(self._obstore.sign_async, store, "GET", key, VALID)
                return url.partition("?")[0]
        try:
            with self._translated(key):
                return str(self._calls.run(self._obstore.sign_async, self._store, "GET", key, VALID))
        except (FetchError, PolicyError):
            if self._scheme == "s3":
                raise
            return None

    def read(self, key: str, offset: int, into: memoryview, etag: str | None) -> None:
        """Read the bytes of an object, from ``offset`` on, that fill ``into``.

        :raises FetchError: the object has another validator than ``etag`` now; or as :meth:`describe`, which lists the
            other errors, too.
        """
        options: dict[str, Any] = {"range": (offset, offset + len(into))}
        if etag is not None:
            options["if_match"] = etag

        async def get() -> memoryview:
            result = await self._obstore.get_async(self._store, key, options=options)
            return memoryview(await result.bytes_async())

        with self._translated(key):
            data = self._calls.run(get)
        if len(data) != len(into):
            raise FetchError(
                f"{self._where(key)} ends early: expected {len(into)} bytes at {offset}, found {len(data)}."
            )
        into[:] = data

    # --- writing -----------------------------------------------------------------------------------------------------

    @contextmanager
    def create(self, key: str, size: int) -> Iterator[CloudWriter]:
        """Write an object of about ``size`` bytes, in parts, which is there once the block ends without an exception.

        :raises FetchError: the store cannot be reached.
        :raises PolicyError: it refuses the credentials.
        """
        part = max(_PART, -(-size // _MAX_PARTS))
        with self._translated(key):
            opened = self._obstore.open_writer_async(
                self._uploads, key, buffer_size=part, max_concurrency=_PARALLEL_PARTS
            )

        def write(data: memoryview) -> None:
            with self._translated(key):
                # What is cancelled leaves an upload that cannot be ended.
                self._calls.run(opened.write, data, grace=_END)

        try:
            yield CloudWriter(write, self._where(key))
        except BaseException as error:
            with suppress(Exception):  # the error that led here says more
                # Ends the upload, and removes its parts.
                self._calls.run(opened.__aexit__, type(error), error, None, limit=_END)
            raise
        with self._translated(key):
            self._calls.run(opened.close, grace=_END)  # or ends the upload, and removes its parts

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, except those that do not exist.

        :raises FetchError: the store cannot be reached.
        :raises PolicyError: it refuses the credentials.
        """
        for key in keys:  # together, GCS and Azure fail with the first that does not exist
            try:
                with self._translated(key):
                    self._calls.run(self._obstore.delete_async, self._store, key)
            except CheckpointNotFoundError:
                continue

    # --- errors ------------------------------------------------------------------------------------------------------

    def _where(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        base = self._obstore.exceptions.BaseError
        try:
            yield
        except LadingError:
            raise
        except (base, OSError, ValueError) as error:
            raise self._error(error, key) from None  # its text has the address of the request, and pages of details

    def _error(self, error: Exception, key: str) -> LadingError:
        text, where = str(error), self._where(key)
        status = next((int(match[1]) for match in _STATUS.finditer(text)), None)
        code = next((match[1] for match in _CODE.finditer(text)), "")
        said = _said(status, code)

        if type(error).__name__ in ("PreconditionError", "NotModifiedError"):
            return FetchError(f"{where} has changed since it was first read. Index it again with `lading index`.")
        if type(error).__name__ == "InvalidPathError":
            return FetchError(
                f"{where}: expected keys that are paths of plain names, found another below it: "
                f"{printable(text, 200)}. Rename that object, or name a folder beside it."
            )
        if _NO_CREDENTIALS.search(text):
            return PolicyError(f"{where}: expected credentials, found none that can be used. {_ADVICE[self._scheme]}.")
        if code in _OTHER_REGION or "configured region" in text:
            region = next((match[1] or match[2] for match in _REGION.finditer(text)), "")
            return FetchError(
                f"{where}: expected a bucket in the region that AWS_REGION names (us-east-1 without it), found one in "
                f"another region. Run `export AWS_REGION={region or 'REGION'}`"
                + ("." if region else f"; `aws s3api get-bucket-location --bucket {self._bucket}` shows the region.")
            )
        if code in ("NoSuchBucket", "ContainerNotFound"):
            return CheckpointNotFoundError(where, f"{self.uri}: {said}: the bucket does not exist. Check its name.")
        if isinstance(error, FileNotFoundError):
            status = 404
        elif type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
            status = status or 403
        if status is not None:
            return self.refusal(where, status, code)
        reason = without_secrets(text.partition("\n")[0].rpartition(" - ")[2])[:300]

        return FetchError(
            f"{where} cannot be reached: {reason}. Check the network and the endpoint, or try again later."
        )

    def refusal(self, where: str, status: int, code: str = "") -> LadingError:
        """Return the error for an answer of the store that is not a success.

        :param where: the address of the object.
        :param code: the code of the error, if the store states one.
        """
        said = _said(status, code)
        if status in (404, 410):
            return CheckpointNotFoundError(where, f"{where}: {said}: the object does not exist. Check the address.")
        if status in (401, 403):
            return PolicyError(
                f"{where}: {said}: the credentials are wrong, or do not give access. {_ADVICE[self._scheme]}."
            )

        return FetchError(f"{where} cannot be used: {said}. Try again later.")


def _said(status: int | None, code: str) -> str:
    return f"the object store answers {status}" + (f" ({code})" if code else "")


class CloudWriter:
    """An object that is being written."""

    def __init__(self, write: Callable[[memoryview], object], name: str) -> None:
        self.name = name
        self._write = write

    def write(self, data: bytes | memoryview) -> None:
        """Write all of ``data``."""
        if not len(data):
            return  # a view of nothing cannot be cast
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PART):  # a call copies what it is given
            self._write(view[start : start + _PART])


def _strong(etag: str | None) -> str | None:
    """Return a strong validator as HTTP writes it: some listings leave out its quotes."""
    if not etag or etag.startswith("W/"):
        return None

    return etag if etag.startswith('"') else f'"{etag}"'


def _check_endpoint(scheme: str) -> bool:
    """Check the endpoint that the environment names; return whether it is asked over plain http.

    :raises PolicyError: it would be, and is not on the loopback interface.
    :raises SettingsError: it is not a URL.
    """
    plain = False
    for name in _ENDPOINTS[scheme]:
        if not (value := os.environ.get(name)):
            continue
        try:
            parts = urlsplit(value)
            host, _ = parts.hostname, parts.port  # parsed, and validated, on access
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https") or parts.username is not None:
            raise SettingsError(f"{name} is expected to be the URL of an object store, `https://host`, but is not.")
        if parts.scheme == "http":
            if not is_loopback(host):
                raise PolicyError(
                    f"{name} names {parts.scheme}://{host}: plain http is refused, since anyone on the way could read "
                    "and change what is sent. Use https; only the loopback interface of this machine is asked without "
                    "it."
                )
            plain = True

    return plain
