from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from lading.sources import partial
from lading.sources.cache import Cache, CachedFile
from lading.sources.partial import Identity, Partial, Range, advisory_lock, sweep, temporary_file
from lading.system.filesystem import FileStat
from tests.helpers.cache_tools import size_of

URI = "https://a.example/org/model.safetensors"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def put(cache: Cache, data: bytes, name: str = "model.safetensors") -> CachedFile:
    sha256 = hashlib.sha256(data).hexdigest()
    cache.tmp.mkdir(parents=True, exist_ok=True)
    path = cache.tmp / "x"
    path.write_bytes(data)
    with open(path, "rb+") as file:
        blob = cache.put(file.fileno(), path, sha256, name)
    return CachedFile(
        sha256=sha256,
        size=len(data),
        etag='"e"',
        published=True,
        stat=FileStat.from_stat(blob.stat()),
        fetched_at=12.5,
    )


@pytest.mark.parametrize(
    ("name", "extension"),
    [
        ("model.safetensors", "safetensors"),
        ("a.b.JSON", "json"),
        ("consolidated.00.pth", "pth"),
        ("model.tar.gz", "blob"),
        ("../../x", "blob"),
        ("safetensors", "safetensors"),
        ("x.s/../y", "blob"),
        ("", "blob"),
    ],
)
def test_names_say_only_the_extension(cache: Cache, name: str, extension: str) -> None:
    sha256 = "ab" * 32
    assert cache.blob(sha256, name) == cache.folder / "blobs" / "ab" / f"{sha256}.{extension}"


@pytest.mark.parametrize("sha256", ["", "ab", "AB" * 32, "../" * 22, "ab" * 32 + "\n"])
def test_what_is_no_digest_is_no_path(cache: Cache, sha256: str) -> None:
    assert cache.find(sha256) is None
    with pytest.raises(ValueError, match="64 lower-case"):
        cache.blob(sha256, "x")


def test_a_file_is_found_by_its_content(cache: Cache) -> None:
    assert cache.find("ab" * 32) is None
    file = put(cache, b"abc")
    path = cache.find(file.sha256)
    assert path is not None
    assert path.read_bytes() == b"abc"
    assert path.stat().st_mode & 0o777 == 0o444
    assert list(cache.tmp.iterdir()) == []


def test_a_link_is_no_file_of_the_cache(cache: Cache, tmp_path: Path) -> None:
    path = cache.blob("ab" * 32, "x.json")
    path.parent.mkdir(parents=True)
    path.symlink_to("/etc/passwd")
    assert cache.find("ab" * 32) is None


def test_the_same_content_again_leaves_what_is_there(cache: Cache) -> None:
    first, second = put(cache, b"abc"), put(cache, b"abc")
    assert first.stat == second.stat
    assert list(cache.tmp.iterdir()) == []


def test_a_damaged_file_is_replaced(cache: Cache) -> None:
    file = put(cache, b"abc")
    path = cache.find(file.sha256)
    assert path is not None
    path.chmod(0o644)
    path.write_bytes(b"abd")
    put(cache, b"abc")
    assert path.read_bytes() == b"abc"


def test_entries(cache: Cache) -> None:
    assert cache.entry(URI) is None
    assert list(cache.entries()) == []
    one, two = put(cache, b"1"), put(cache, b"2")
    cache.add(URI, {"model.safetensors": one})
    cache.add(URI, {"../evil": two})

    entry = cache.entry(URI)
    assert entry is not None
    assert entry.uri == URI
    assert entry.files == {"model.safetensors": one, "../evil": two}
    assert list(cache.entries()) == [entry]

    cache.add(URI, {"model.safetensors": two})
    entry = cache.entry(URI)
    assert entry is not None
    assert entry.files == {"model.safetensors": two, "../evil": two}


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "list", "deep", "digest", "uri", "size", "huge", "link", "fifo", "folder"]
)
def test_a_damaged_entry_is_none(cache: Cache, tmp_path: Path, damage: str) -> None:
    cache.add(URI, {"model.safetensors": put(cache, b"1")})
    (path,) = (cache.folder / "entries").iterdir()
    text = path.read_text()
    path.unlink()
    document = json.loads(text)
    if damage == "cut":
        path.write_text(text[:-20])
    elif damage == "empty":
        path.touch()
    elif damage == "list":
        path.write_text("[]")
    elif damage == "deep":
        path.write_text("[" * 100_000)
    elif damage == "digest":
        document["files"]["model.safetensors"]["sha256"] = "../../../etc/passwd"
        path.write_text(json.dumps(document))
    elif damage == "uri":
        path.write_text(json.dumps({**document, "uri": "https://other.example/x"}))
    elif damage == "size":
        document["files"]["model.safetensors"]["size"] = "1"
        path.write_text(json.dumps(document))
    elif damage == "huge":
        document["files"]["model.safetensors"]["fetched_at"] = 10**400
        path.write_text(json.dumps(document))
    elif damage == "link":
        (tmp_path / "elsewhere").write_text(text)
        path.symlink_to(tmp_path / "elsewhere")
    elif damage == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()

    assert cache.entry(URI) is None
    assert list(cache.entries()) == []


def test_removing_keeps_what_others_refer_to(cache: Cache) -> None:
    one, two = put(cache, b"1" * 100), put(cache, b"2" * 50)
    cache.add(URI, {"a": one, "b": two})
    cache.add(URI + "2", {"c": two})
    assert size_of(cache) == 150

    assert cache.remove(URI) == 100
    assert cache.entry(URI) is None
    assert cache.find(one.sha256) is None
    assert cache.find(two.sha256) is not None

    assert cache.remove(URI) == 0
    assert cache.remove(URI + "2") == 50
    assert size_of(cache) == 0


def test_each_catalog_has_entries_of_its_own(cache: Cache) -> None:
    other = Cache(cache.folder, catalog="ab" * 8)
    file = put(cache, b"1" * 100)
    cache.add(URI, {"a": file})
    other.add(URI, {"a": file})
    other.add(URI + "2", {"b": file})

    assert cache.entry(URI + "2") is None
    (entry,) = other.others(URI)
    assert entry.files["a"].stat is None, "another one's word on the state of a file"
    assert entry.files["a"].sha256 == file.sha256
    assert sorted(entry.catalog for entry in other.entries()) == ["", *2 * ["ab" * 8]]

    assert cache.remove(URI) == 0
    assert other.remove(URI) == 0
    assert other.entry(URI) is None
    assert other.remove(URI + "2") == 100


def test_an_entry_that_others_may_write_says_nothing_of_states(cache: Cache) -> None:
    cache.add(URI, {"a": put(cache, b"1")})
    (path,) = (cache.folder / "entries").iterdir()
    path.chmod(0o666)
    entry = cache.entry(URI)
    assert entry is not None
    assert entry.files["a"].stat is None


def test_own_entries_are_believed_under_every_umask(cache: Cache) -> None:
    file = put(cache, b"1")
    before = os.umask(0o002)
    try:
        cache.add(URI, {"a": file})
    finally:
        os.umask(before)
    entry = cache.entry(URI)
    assert entry is not None
    assert entry.files["a"] == file


def test_files_of_other_users_stay_where_an_entry_cannot_be_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.add(URI, {"a": put(cache, b"1" * 100)})
    assert cache.files_of_others() == set()

    monkeypatch.setattr("lading.sources.cache.os.geteuid", lambda: 2**31 - 2)
    assert cache.files_of_others() == set(), "all entries can be read"
    assert len(cache.removable(URI)) == 1

    hidden = cache.folder / "entries" / f"{'0' * 64}.{'cd' * 8}.json"
    hidden.write_text("not for this user")
    assert len(cache.files_of_others()) == 1
    assert cache.removable(URI) == []


def test_entries_that_cannot_be_listed_are_unknown(cache: Cache) -> None:
    assert not cache.has_unknown_entries()
    cache.folder.mkdir(parents=True, exist_ok=True)
    (cache.folder / "entries").write_text("not a folder")
    assert cache.has_unknown_entries()


def test_the_secrets_of_an_address_are_not_kept(cache: Cache) -> None:
    cache.add(URI, {"a": put(cache, b"1")})
    for uri in (URI + "?token=Secret", URI + "?token=Geheim#Secret", "https://Secret@a.example/org/model.safetensors"):
        cache.add(uri, {"a": put(cache, b"1")})
        entry = cache.entry(uri)
        assert entry is not None
        assert entry.uri == URI
    paths = list((cache.folder / "entries").iterdir())
    assert len(paths) == 4
    assert not any(word in path.read_text() for path in paths for word in ("Secret", "Geheim"))
    assert sorted(path.stat().st_mode & 0o077 == 0 for path in paths)[1:] == [True, True, True]


# --- what is being written -------------------------------------------------------------------------------------------

IDENTITY = Identity(url=URI, etag='"e"', size=100, sha256=None)
DONE = Range(0, 10, blake3(b"0123456789").hexdigest())


def abandon(folder: Path, identity: Identity = IDENTITY) -> Partial:
    """What a process left that has ended: ten bytes, and notes that say so."""
    mine = Partial.open(folder, identity)
    os.pwrite(mine.fd, b"0123456789", 0)
    mine.release([DONE])
    return mine


def test_what_an_ended_process_left_is_taken_up_once(tmp_path: Path) -> None:
    abandon(tmp_path)
    first, second = Partial.open(tmp_path, IDENTITY), Partial.open(tmp_path, IDENTITY)
    assert (first.done, second.done) == ([DONE], [])
    assert os.pread(first.fd, 100, 0) == b"0123456789"
    first.discard()
    second.discard()
    assert list(tmp_path.iterdir()) == []


def test_what_a_living_process_writes_is_left_to_it(tmp_path: Path) -> None:
    mine = Partial.open(tmp_path, IDENTITY)
    os.pwrite(mine.fd, b"0123456789", 0)
    mine.note([DONE])
    assert Partial.open(tmp_path, IDENTITY).done == []
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 100_000,) * 2)
    sweep(tmp_path)
    assert mine.path.exists()


@pytest.mark.parametrize(
    "other",
    [
        Identity(url=URI, etag='"f"', size=100, sha256=None),
        Identity(url=URI, etag='"e"', size=101, sha256=None),
        Identity(url=URI, etag='"e"', size=100, sha256="ab" * 32),
        Identity(url=URI + "?", etag='"e"', size=100, sha256=None),
        Identity(url=URI, etag=None, size=100, sha256=None),
    ],
)
def test_what_is_of_another_content_is_not_taken_up(tmp_path: Path, other: Identity) -> None:
    abandon(tmp_path)
    new = Partial.open(tmp_path, other)
    assert new.done == []
    if other.resumable and other.url == URI:
        assert list(tmp_path.iterdir()) == [new.path]  # it would only fill the disk


@pytest.mark.parametrize(
    "notes",
    [
        "",
        "[]",
        '{"done": [[0, 10, "d"]]}',
        '[[0, 11, "d"]]',
        '[[5, 10, "d"], [0, 5, "d"]]',
        '[[0, 0, "d"]]',
        "[0]",
        "[[0, 10]]",
    ],
)
def test_notes_that_make_no_sense_are_none(tmp_path: Path, notes: str) -> None:
    path = abandon(tmp_path).path.with_suffix(".json")
    if notes.startswith("[") and notes != "[]":
        notes = json.dumps({**json.loads(path.read_text()), "done": json.loads(notes)})
    path.write_text(notes)
    assert Partial.open(tmp_path, IDENTITY).done == []


def test_what_was_changed_since_it_came_is_fetched_again(tmp_path: Path) -> None:
    mine = Partial.open(tmp_path, IDENTITY)
    os.pwrite(mine.fd, b"0123456789", 0)
    first, second = Range(0, 5, blake3(b"01234").hexdigest()), Range(5, 10, blake3(b"56789").hexdigest())
    mine.release([first, second])
    os.pwrite(mine.fd, b"X", 2)

    assert Partial.open(tmp_path, IDENTITY).done == [second]


def test_without_a_validator_nothing_is_kept(tmp_path: Path) -> None:
    abandon(tmp_path, Identity(url=URI, etag=None, size=100, sha256=None))
    assert list(tmp_path.iterdir()) == []


def test_litter_is_swept_when_it_is_old(tmp_path: Path) -> None:
    abandon(tmp_path)
    (tmp_path / "somebody's.file").touch()
    assert sweep(tmp_path) == 0
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 100_000,) * 2)
    assert sweep(tmp_path) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["somebody's.file"]


def test_a_temporary_file_is_gone_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), temporary_file(tmp_path, "entry"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_advisory(tmp_path: Path) -> None:
    with advisory_lock(tmp_path / "locks", "k", written=tmp_path) as waited:
        assert not waited
    (tmp_path / "file").touch()
    with advisory_lock(tmp_path / "file", "k", written=tmp_path) as waited:  # no such folder can be made
        assert not waited


HOLDER = """
import sys, time
from pathlib import Path
from lading.sources.partial import advisory_lock

folder = Path(sys.argv[1])
with advisory_lock(folder / "locks", "k", written=folder):
    print("held", flush=True)
    while True:
        sum(range(100_000))
        time.sleep(0.01)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_stopped_process_is_not_waited_for(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SILENCE", 0.5)
    holder.send_signal(signal.SIGSTOP)
    with advisory_lock(tmp_path / "locks", "k", written=tmp_path) as waited:
        assert waited


def test_a_process_at_work_is_waited_for_until_it_ends(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SILENCE", 2.0)
    threading.Timer(3, holder.kill).start()
    with advisory_lock(tmp_path / "locks", "k", written=tmp_path) as waited:
        assert waited
        assert holder.wait() == -signal.SIGKILL


def test_an_owner_on_another_machine_is_known_by_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SILENCE", 0.5)
    (tmp_path / "locks").mkdir()
    with open(tmp_path / "locks" / "k.lock", "w") as file:
        file.write("somewhere-1-2\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        (tmp_path / "part").write_bytes(b"x")
        with advisory_lock(tmp_path / "locks", "k", written=tmp_path) as waited:
            assert waited
