"""Object stores as sources: addresses, listings, ranges, signatures that expire, errors."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from lading.errors import (
    AddressError,
    CheckpointNotFoundError,
    FetchError,
    LadingError,
    NotSupportedError,
    PolicyError,
    SettingsError,
)
from lading.sources import open as sources
from lading.sources.cache import Cache
from lading.sources.cloud import bucket as buckets
from lading.sources.cloud.address import CloudAddress
from lading.sources.cloud.source import CloudSource
from lading.sources.source import RemoteFile, Snapshot
from lading.sources.web.download import Concurrency
from tests.helpers.catalog_tools import settings_in
from tests.servers.s3 import SECRET, Answer, Bucket, Moto, Request, use_gcs, use_s3

DATA = bytes(range(256)) * 1000


def source(uri: str, tmp_path: Path, **options: object) -> CloudSource:
    return CloudSource(uri, cache=Cache(tmp_path / "cache"), offline=bool(options.pop("offline", False)), **options)  # type: ignore[arg-type]


def read(of: CloudSource, file: RemoteFile, offset: int, size: int) -> bytes:
    data = bytearray(size)
    of.read(Snapshot(uri=of.uri, revision="", files=(file,)), file, offset, memoryview(data))
    return bytes(data)


def fetch(of: CloudSource) -> dict[str, bytes]:
    snapshot = of.snapshot()
    fetched = of.fetch(snapshot, snapshot.files, known=lambda _: None, progress=False)
    return {file.name: file.path.read_bytes() for file in fetched}


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "bucket", "folder", "name", "is_file"),
    [
        ("s3://bucket", "bucket", "", "", False),
        ("s3://bucket/", "bucket", "", "", False),
        ("gs://my_bucket.org/a/b", "my_bucket.org", "a/b", "b", False),
        ("az://container/a/b/", "container", "a/b", "b", False),
        ("S3://bucket/a", "bucket", "a", "a", False),
        ("s3://bucket/v1.0", "bucket", "v1.0", "v1.0", False),
        ("s3://bucket/.json", "bucket", ".json", ".json", False),
        ("s3://bucket/a/model.safetensors", "bucket", "a", "model.safetensors", True),
        ("s3://bucket/model.safetensors", "bucket", "", "model.safetensors", True),
        ("s3://bucket/a/MODEL.PT", "bucket", "a", "MODEL.PT", True),
        ("s3://bucket/a/model.bin/", "bucket", "a/model.bin", "model.bin", False),
        ("s3://bucket/ü ö/%20+*~&=/日本", "bucket", "ü ö/%20+*~&=/日本", "日本", False),
    ],
)
def test_an_address(uri: str, bucket: str, folder: str, name: str, is_file: bool) -> None:
    address = CloudAddress.from_uri(uri)
    assert (address.bucket, address.folder, address.name, address.is_file) == (bucket, folder, name, is_file)
    assert sources.has_folders(uri) is not is_file


@pytest.mark.parametrize(
    "uri",
    [
        "s3:bucket", "s3://", "s3:///key", "s3://b", "s3://-bucket/x", f"s3://{'b' * 64}/x", "s3://buck et/x",
        "s3://key:s3cr3t@bucket/x", "s3://bucket:80/x", "s3://bücket/x", "s3://bucket/a//b", "s3://bucket/a/../b",
        "s3://bucket/./a", "s3://bucket//a", "s3://bucket/a\\b", "s3://bucket/a\nb", "s3://bucket/a\x00",
        "s3://bucket/a?X-Amz-Signature=s3cr3t", "s3://bucket/a#s3cr3t", "s3://bucket/" + "a/" * 600 + "a",
        "https://bucket/x",
    ],
)  # fmt: skip
def test_an_address_that_is_not_valid(uri: str) -> None:
    with pytest.raises(AddressError) as error:
        CloudAddress.from_uri(uri)
    assert "s3cr3t" not in str(error.value)
    assert "s3://bucket/prefix" in str(error.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(buckets, "find_spec", lambda name: None if name == "obstore" else found(name))
    settings = settings_in(tmp_path)
    for scheme in ("s3", "gs", "az"):
        with pytest.raises(NotSupportedError, match=r"pip install 'lading-hub\[cloud\]'"):
            sources.open_source(f"{scheme}://bucket/x", inner_path=None, revision=None, settings=settings)
        with pytest.raises(NotSupportedError, match=r"pip install 'lading-hub\[cloud\]'"):
            sources.require_readable(f"{scheme}://bucket/x")


@pytest.mark.parametrize(
    ("variable", "value", "error"),
    [
        ("AWS_ENDPOINT_URL", "http://10.0.0.1:9000", PolicyError),
        ("AWS_ENDPOINT_URL", "http://minio.local", PolicyError),
        ("AWS_ENDPOINT_URL_S3", "http://192.168.1.1", PolicyError),
        ("AWS_ENDPOINT", "nonsense", SettingsError),
        ("AWS_ENDPOINT_URL", "ftp://host", SettingsError),
        ("AWS_ENDPOINT_URL", "https://", SettingsError),
        ("AWS_ENDPOINT_URL", "http://[", SettingsError),
        ("AWS_ENDPOINT_URL", "https://host:port", SettingsError),
        ("AWS_ENDPOINT_URL", f"https://key:{SECRET}@host", SettingsError),
    ],
)
def test_an_endpoint_that_is_refused(
    s3: Bucket, moto: Moto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, error: type
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=variable) as caught:
        source(f"{s3.uri}/x", tmp_path).snapshot()
    assert SECRET not in str(caught.value)
    assert moto.requests == []


# --- what is there ----------------------------------------------------------------------------------------------------


def test_a_listing(s3: Bucket, tmp_path: Path) -> None:
    for key in ("a b/ü/1.bin", "a b/2%20.json", "a b/", "a b/back\\slash", "a bc/3", "z"):
        s3.put(key, key.encode())
    snapshot = source(f"{s3.uri}/a b/", tmp_path).snapshot()
    assert [(file.name, file.size) for file in snapshot.files] == [("2%20.json", 13), ("ü/1.bin", 12)]
    assert all(file.etag is not None for file in snapshot.files)
    assert [file.name for file in source(s3.uri, tmp_path).snapshot().files][-1] == "z"


def test_thousands_of_objects(s3: Bucket, moto: Moto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.s3.models import s3_backends

    backend = s3_backends["123456789012"]["aws"]
    for i in range(1100):
        backend.put_object(s3.name, f"many/{i:04}", b"")
    assert [file.name for file in source(f"{s3.uri}/many", tmp_path).snapshot().files] == [
        f"{i:04}" for i in range(1100)
    ]
    assert len([each for each in moto.requests if "list-type" in each.query]) == 2

    monkeypatch.setattr(buckets, "MAX_FILES", 1000)
    with pytest.raises(FetchError, match="more than 1000 objects"):
        source(f"{s3.uri}/many", tmp_path).snapshot()


def test_nothing_there(s3: Bucket, tmp_path: Path) -> None:
    s3.put("models/one", b"")
    for uri in (f"{s3.uri}/model", f"{s3.uri}/models/one", f"{s3.uri}/x/model.safetensors", "s3://no-such-bucket/x"):
        with pytest.raises(CheckpointNotFoundError) as error:
            source(uri, tmp_path).snapshot()
        assert uri.removesuffix("/x") in str(error.value)


def test_a_key_that_is_not_a_path(s3: Bucket, tmp_path: Path) -> None:
    s3.put("a/model.safetensors", b"")
    s3.put("a//model.safetensors", b"")
    with pytest.raises(FetchError, match=r"expected keys that are paths of plain names.*a//model"):
        source(f"{s3.uri}/a", tmp_path).snapshot()


@pytest.mark.parametrize(
    "key",
    [
        "a/../../etc/passwd",
        "a/./x",
        "a//x",
        "a/x\x1b[31m",
        "a/\x00",
        "b/x",
        "../x",
        "",
        "a/back\\slash",
        "a/" + "x" * 300,
    ],
)
def test_a_store_that_lists_what_it_should_not(s3: Bucket, moto: Moto, tmp_path: Path, key: str) -> None:
    """Its keys become neither paths nor control characters of a terminal."""
    contents = "".join(
        f"<Contents><Key>{escape(each)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;1&quot;</ETag><Size>3</Size></Contents>"
        for each in ("a/good.json", key)
    )
    listing = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
    moto.behavior = lambda each: (200, listing, {}) if "list-type" in each.query else None
    names, said = [], ""
    try:
        names = [file.name for file in source(f"{s3.uri}/a", tmp_path).snapshot().files]
    except FetchError as error:
        said = str(error)
    assert said.isprintable()
    assert bool(said) != (names == ["good.json"])


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_public_bucket(s3: Bucket, moto: Moto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "1")
    monkeypatch.setenv("GOOGLE_BASE_URL", moto.url)
    moto.public.add(s3.name)
    s3.put("ü b/%20.bin", DATA)

    assert fetch(source(f"{scheme}://{s3.name}/ü b", tmp_path)) == {"%20.bin": DATA}
    assert not [each for each in moto.requests if each.query.keys() & {"X-Amz-Signature", "X-Amz-Credential"}]
    moto.public.clear()
    with pytest.raises(PolicyError, match="SKIP_SIGNATURE"):
        source(f"{scheme}://{s3.name}/ü b", tmp_path).snapshot()


def test_urls_of_azure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure has no server here: the URLs show that the account and the container arrive."""
    pytest.importorskip("obstore", reason="obstore is not installed")
    use_s3(monkeypatch, "https://host")
    bucket = buckets.Bucket(CloudAddress.from_uri("az://container/a"))
    with pytest.raises(PolicyError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        bucket.files("a")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acme")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    url = buckets.Bucket(CloudAddress.from_uri("az://container/a")).url("a/ü b")
    assert url is not None
    assert url.startswith("https://acme.blob.core.windows.net/container/a/%C3%BC%20b?")
    assert "sig=" in url
    monkeypatch.setenv("AZURE_SKIP_SIGNATURE", "true")
    url = buckets.Bucket(CloudAddress.from_uri("az://container/a")).url("a/ü b")
    assert url == "https://acme.blob.core.windows.net/container/a/%C3%BC%20b"


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_bytes(s3: Bucket, moto: Moto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    use_gcs(monkeypatch, moto, s3)
    uri = f"{scheme}://{s3.name}/a"
    s3.put("a/ü 1%.bin", DATA)
    s3.put("a/empty.bin", b"")
    of = source(uri, tmp_path)
    snapshot = of.snapshot()
    file = snapshot.file("ü 1%.bin")
    assert file is not None
    for offset, size in ((0, 10), (999, 3), (len(DATA) - 5, 5), (0, len(DATA)), (7, 0)):
        assert read(of, file, offset, size) == DATA[offset : offset + size]
    assert fetch(of) == {"ü 1%.bin": DATA, "empty.bin": b""}
    moto.requests.clear()
    assert fetch(source(uri, tmp_path)) == {"ü 1%.bin": DATA, "empty.bin": b""}
    assert moto.gets(".bin") == []
    assert fetch(source(uri, tmp_path, offline=True)) == {"ü 1%.bin": DATA, "empty.bin": b""}


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_an_object_that_changes(
    s3: Bucket, moto: Moto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    use_gcs(monkeypatch, moto, s3)
    uri = f"{scheme}://{s3.name}/a"
    s3.put("a/1.bin", DATA)
    of = source(uri, tmp_path)
    (file,) = of.snapshot().files
    assert read(of, file, 0, 5) == DATA[:5]
    s3.put("a/1.bin", DATA[::-1])
    with pytest.raises(FetchError, match="has changed"):
        read(of, file, 5, 5)
    with pytest.raises(FetchError, match="has changed"):
        of.fetch(of.snapshot(), [file], known=lambda _: None, progress=False)
    assert fetch(of) == {"1.bin": DATA[::-1]}


def test_a_signature_that_has_expired_is_not_sent(
    s3: Bucket, moto: Moto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("a/1.bin", DATA)
    of = source(f"{s3.uri}/a", tmp_path)
    (file,) = of.snapshot().files
    signed, sign = [], buckets.Bucket.url
    monkeypatch.setattr(buckets.Bucket, "url", lambda self, key: signed.append(key) or sign(self, key))
    assert read(of, file, 0, 5) + read(of, file, 5, 5) == DATA[:10]
    before, now = len(signed), time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    assert read(of, file, 10, 5) == DATA[10:15]
    assert len(signed) == before + 1
    assert len(moto.gets("1.bin")) == 3


@pytest.mark.parametrize("status", [400, 403])
def test_a_signature_that_the_store_takes_for_expired(s3: Bucket, moto: Moto, tmp_path: Path, status: int) -> None:
    """Its clock is ahead, or the credentials were shorter than the signature."""
    s3.put("a/1.bin", DATA)
    of = source(f"{s3.uri}/a", tmp_path)
    (file,) = of.snapshot().files
    assert read(of, file, 0, 5) == DATA[:5]
    (first,) = moto.gets("1.bin")
    moto.behavior = lambda each: (
        (status, "ExpiredToken", {}) if each.query.get("X-Amz-Date") == first.query["X-Amz-Date"] else None
    )
    time.sleep(1.1)  # a signature has the time in seconds
    assert read(of, file, 5, 5) == DATA[5:10]


CONCURRENCY = Concurrency(connections=1, piece=32 << 10)


def test_a_signature_that_expires_in_the_middle_of_a_fetch(s3: Bucket, moto: Moto, tmp_path: Path) -> None:
    s3.put("a/1.bin", DATA)
    expired: list[str] = []

    def behavior(request: Request) -> Answer | None:
        if len(ranges := [each for each in moto.requests if each.ranged]) == 3:
            time.sleep(1.1)  # a signature has the time in seconds
            expired.append(ranges[0].query["X-Amz-Date"])
        return (403, "AccessDenied", {}) if request.query.get("X-Amz-Date") in expired else None

    moto.behavior = behavior
    assert fetch(source(f"{s3.uri}/a", tmp_path, concurrency=CONCURRENCY)) == {"1.bin": DATA}
    assert len({each.query["X-Amz-Date"] for each in moto.gets("1.bin")}) == 2


def test_an_object_that_changes_in_the_middle_of_a_fetch(s3: Bucket, moto: Moto, tmp_path: Path) -> None:
    s3.put("a/1.bin", DATA)
    of = source(f"{s3.uri}/a", tmp_path, concurrency=CONCURRENCY)

    def behavior(_: Request) -> None:
        if len([each for each in moto.requests if each.ranged]) == 3:
            s3.put("a/1.bin", DATA[::-1])

    moto.behavior = behavior
    with pytest.raises(FetchError, match="has changed") as error:
        fetch(of)
    assert "X-Amz" not in str(error.value)
    moto.behavior = lambda _: None
    assert fetch(of) == {"1.bin": DATA[::-1]}


@pytest.fixture
def released(moto: Moto) -> Iterator[threading.Event]:
    """Set at the end of a test, for what an answer waits for."""
    event = threading.Event()
    yield event
    event.set()


def test_ctrl_c_does_not_wait_for_an_answer(s3: Bucket, moto: Moto, tmp_path: Path, released: threading.Event) -> None:
    answered = threading.Event()

    def behavior(_: Request) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        released.wait(30)
        answered.set()

    moto.behavior = behavior
    for uri in (f"{s3.uri}/folder", f"{s3.uri}/model.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            source(uri, tmp_path).snapshot()
    assert not answered.is_set()


def test_ctrl_c_does_not_wait_for_bytes(
    s3: Bucket, moto: Moto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    use_gcs(monkeypatch, moto, s3)
    s3.put("a/1.bin", bytes(20 << 20))
    of, answered = source(f"gs://{s3.name}/a", tmp_path), threading.Event()
    snapshot = of.snapshot()

    def behavior(request: Request) -> None:
        if request.headers["range"].endswith(f"-{(20 << 20) - 1}"):  # the last of three
            os.kill(os.getpid(), signal.SIGINT)
            released.wait(30)
            answered.set()

    moto.behavior = behavior
    with pytest.raises(KeyboardInterrupt):
        of.fetch(snapshot, snapshot.files, known=lambda _: None, progress=False)
    assert not answered.is_set()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_close_ends_reads_in_other_threads(
    s3: Bucket, moto: Moto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, released: threading.Event, scheme: str
) -> None:
    use_gcs(monkeypatch, moto, s3)
    s3.put("a/1.bin", DATA)
    of = source(f"{scheme}://{s3.name}/a", tmp_path)
    (file,) = of.snapshot().files
    asked = threading.Event()
    moto.behavior = lambda _: asked.set() or (released.wait(30) and None)
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read, of, file, 0, 5)
        asked.wait()
        of.close()
        with pytest.raises(FetchError, match="source was closed"):
            reading.result(20)
    moto.behavior = lambda _: None
    assert read(of, file, 0, 5) == DATA[:5]


# --- writes -----------------------------------------------------------------------------------------------------------


@pytest.mark.few(3)
@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize("size", [0, 5, (16 << 20) + 5])
def test_a_write(s3: Bucket, moto: Moto, monkeypatch: pytest.MonkeyPatch, scheme: str, size: int) -> None:
    use_gcs(monkeypatch, moto, s3)
    bucket = buckets.Bucket(CloudAddress.from_uri(f"{scheme}://{s3.name}"))
    data = array("H", range(3))
    with bucket.create("a b/ü%20", size) as file:
        file.write(memoryview(data)[:0])
        file.write(bytes(size))
        file.write(memoryview(data))
    assert s3.get("a b/ü%20") == bytes(size) + data.tobytes()
    bucket.delete(["a b/ü%20", "a b/none"])
    assert s3.names() == []


# --- errors -----------------------------------------------------------------------------------------------------------


def every(answer: Answer) -> Callable[[Request], Answer]:
    return lambda _: answer


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        ((403, "AccessDenied", {}), PolicyError, "AWS_ACCESS_KEY_ID"),
        ((403, "SignatureDoesNotMatch", {}), PolicyError, "AWS_SECRET_ACCESS_KEY"),
        ((401, "Unauthorized", {}), PolicyError, "AWS_ACCESS_KEY_ID"),
        ((404, "NoSuchBucket", {}), CheckpointNotFoundError, "answers 404"),
        ((301, "PermanentRedirect", {}), FetchError, "AWS_REGION"),
        ((400, "InvalidRequest", {}), FetchError, "answers 400"),
    ],
)
@pytest.mark.parametrize("name", ["folder", "model.safetensors"])
def test_an_answer_that_is_an_error(
    s3: Bucket, moto: Moto, tmp_path: Path, answer: Answer, error: type[LadingError], said: str, name: str
) -> None:
    s3.put("folder/1.bin", DATA)
    moto.behavior = every(answer)
    with pytest.raises(error, match=said) as caught:
        source(f"{s3.uri}/{name}", tmp_path).snapshot()
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    for secret in (SECRET, "Signature=", "Credential"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize(("status", "error"), [(403, PolicyError), (404, CheckpointNotFoundError), (400, FetchError)])
def test_an_error_among_the_ranges(
    s3: Bucket, moto: Moto, tmp_path: Path, status: int, error: type[LadingError]
) -> None:
    s3.put("a/ü 1.bin", DATA)
    of = source(f"{s3.uri}/a", tmp_path)
    (file,) = of.snapshot().files
    moto.behavior = every((status, "Some", {}))
    with pytest.raises(error, match=rf"{s3.uri}/a/ü 1\.bin: .*{status}|{s3.uri}/a/ü 1\.bin cannot") as caught:
        read(of, file, 0, 5)
    assert "X-Amz" not in str(caught.value)


def test_the_region_that_a_store_names(s3: Bucket, moto: Moto, tmp_path: Path) -> None:
    def behavior(request: Request) -> Answer:
        return 400, "<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region></Error>", {}

    moto.behavior = behavior
    with pytest.raises(FetchError, match="export AWS_REGION=eu-west-3"):
        source(f"{s3.uri}/folder", tmp_path).snapshot()
