"""Checkpoints of ``torch.save`` that lie, that would run code, or that are damaged: each is a clear error."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lading import formats
from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError, NotSupportedError, PolicyError
from tests.helpers.torch_files import (
    GOOD,
    Member,
    archive,
    checkpoint,
    dictionary,
    equal,
    many,
    name,
    number,
    pickled,
    read_all,
    save,
    storage,
    tensor,
    text,
)

DATA = struct.pack("<6f", *range(6))


def _index(tmp_path: Path, data: bytes, **options: Any) -> Any:
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    return formats.index(path, **options)


def test_what_is_made_by_hand_is_good_but_for_the_lies_below(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(checkpoint())
    expected = {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3)}

    assert equal(read_all(path)["w"], expected["w"])
    assert equal(torch.load(path, weights_only=True)["w"], expected["w"])


# --- code ---


class _Calls:
    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self._reduced = function, args

    def __reduce__(self) -> Any:
        return self._reduced


def _attacks(canary: Path) -> list[object]:
    command = f"touch {canary}"
    return [
        _Calls(os.system, command),
        _Calls(eval, f"open({str(canary)!r}, 'w')"),
        _Calls(exec, f"open({str(canary)!r}, 'w')"),
        _Calls(getattr, os, "system"),
        _Calls(__import__, "os"),
        _Calls(torch.load, str(canary)),
        _Calls(torch.hub.load, "somebody/something", "model"),
        _Calls(open, str(canary), "w"),
        {"w": torch.ones(1), "x": [_Calls(os.system, command)]},
        {"model": {"w": torch.ones(1)}, "args": _Calls(os.system, command)},
    ]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("attack", range(10))
def test_code_is_refused_and_never_run(tmp_path: Path, attack: int, legacy: bool) -> None:
    canary = tmp_path / "canary"
    value = _attacks(canary)[attack]
    if isinstance(value, _Calls) and value._reduced[0] is getattr:
        value = _Calls(getattr, "os", "system")  # a module itself does not pickle
    data = save(value, legacy=legacy)

    with pytest.raises(PolicyError, match="`restrict=False`"):
        _index(tmp_path, data)
    try:
        _index(tmp_path, data, restrict=False, cache=tmp_path / "cache")
    except CorruptModelCheckpointError:
        pass
    assert not canary.exists()


@pytest.mark.parametrize("where", ["magic", "protocol", "system", "keys"])
def test_code_in_the_small_pickles_of_a_legacy_file(tmp_path: Path, where: str) -> None:
    bad = pickle.dumps(_Calls(os.system, f"touch {tmp_path / 'canary'}"), 2)
    parts = {
        "magic": pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        "protocol": pickle.dumps(1001, 2),
        "system": pickle.dumps({"little_endian": True}, 2),
        "data": GOOD,
        "keys": pickle.dumps(["0"], 2),
    }
    tail = struct.pack("<q", 6) + DATA
    assert list(_index(tmp_path, b"".join(parts.values()) + tail).names) == ["w"]

    with pytest.raises(PolicyError):
        _index(tmp_path, b"".join((parts | {where: bad}).values()) + tail)
    with pytest.raises(CorruptModelCheckpointError):
        _index(tmp_path, b"".join((parts | {where: bad}).values()) + tail, restrict=False)
    assert not (tmp_path / "canary").exists()


# --- pickles ---

_OPEN = b"("
BAD_PICKLES: dict[str, bytes] = {
    "nothing": b"",
    "a protocol of text": pickled(dictionary(), 0),
    "a protocol to come": pickled(dictionary(), 6),
    "a protocol in the middle": pickled(b"\x80\x02}"),
    "no end": GOOD[:-1],
    "a stack that is empty": pickled(b""),
    "a stack that is empty, at once": b"\x80\x020.",
    "two values": pickled(b"}}"),
    "a mark that stays": pickled(b"(}"),
    "no mark": pickled(b"t"),
    "a tuple of too few": pickled(b"}\x87"),
    "a memo that is empty": pickled(b"h\x00"),
    "a memo that is empty, at 4 bytes": pickled(b"j\xff\xff\xff\xff"),
    "an unknown instruction": pickled(b"\xff"),
    "a duplicate": pickled(b"}2"),
    "an instance of protocol 0": pickled(b"(ios\nsystem\n"),
    "an object of protocol 1": pickled(b"(" + name("collections", "OrderedDict") + b"o"),
    "the registry": pickled(b"\x82\x01"),
    "a name that does not end": pickled(b"c" + b"a" * 1000 + b"\nb\n"),
    "a name that is not UTF-8": pickled(b"c\xff\nb\n"),
    "a name of numbers": pickled(b"K\x01K\x02\x93"),
    "text that is not UTF-8": pickled(b"X\x01\x00\x00\x00\xff"),
    "text that does not end": pickled(b"X\xff\xff\xff\xff"),
    "text of 2^63 bytes": pickled(b"\x8d" + b"\xff" * 8),
    "a number of 2^32 bytes": pickled(b"\x8b\xff\xff\xff\xff"),
    "an append to a number": pickled(b"K\x01K\x02a"),
    "an item of a list": pickled(b"]K\x01K\x02s"),
    "an odd number of items": pickled(b"}(K\x01u"),
    "a call of a string": pickled(text("os.system") + b")R"),
    "a call of a dtype": pickled(name("torch", "float32") + b")R"),
    "a call with a list": pickled(name("collections", "OrderedDict") + b"]R"),
    "a state of a string": pickled(text("x") + b"}b"),
    "an object of a string": pickled(text("x") + b")\x81"),
    "a storage of no storage": pickled(dictionary(w=tensor(b"}"))),
    "a storage that is a string": pickled(dictionary(w=text("x") + b"Q")),
    "a storage of a function": pickled(dictionary(w=tensor(storage(kind=("torch", "Size"))))),
    "a storage of a negative size": pickled(dictionary(w=tensor(storage(count=-6)))),
    "a storage that is a view": pickled(dictionary(w=tensor(storage().replace(b"tQ", b"K\x01tQ")))),
    "a storage that is not there": pickled(dictionary(w=tensor(storage("1")))),
    "a storage of another size": pickled(dictionary(w=tensor(storage(count=7)))),
    "a storage of another dtype": pickled(dictionary(w=tensor(storage(kind=("torch", "DoubleStorage"))))),
    "a storage outside": pickled(dictionary(w=tensor(storage("../data.pkl")))),
    "a tensor beyond its storage": pickled(dictionary(w=tensor(storage(), (3, 3)))),
    "a tensor beyond its storage, by its offset": pickled(dictionary(w=tensor(storage(), offset=1))),
    "a tensor beyond its storage, by its strides": pickled(dictionary(w=tensor(storage(), strides=(4, 1)))),
    "a tensor before its storage": pickled(dictionary(w=tensor(storage(), offset=-1))),
    "a tensor that goes backwards": pickled(dictionary(w=tensor(storage(), strides=(3, -1)))),
    "a negative shape": pickled(dictionary(w=tensor(storage(), (-2, -3)))),
    "a shape that overflows": pickled(dictionary(w=tensor(storage(), (2**62, 2**62), (0, 0)))),
    "a shape that overflows, of no elements": pickled(dictionary(w=tensor(storage(), (0, 2**62), (1, 1)))),
    "a shape beyond 64 bits": pickled(dictionary(w=tensor(storage(), (2**64,), (1,)))),
    "more strides than dims": pickled(dictionary(w=tensor(storage(), (2, 3), (3, 1, 1)))),
    "too many dims": pickled(dictionary(w=tensor(storage(), (1,) * 65, (1,) * 65))),
    "no arguments": pickled(dictionary(w=name("torch._utils", "_rebuild_tensor_v2") + b")R")),
    "a parameter of a string": pickled(
        dictionary(w=name("torch._utils", "_rebuild_parameter") + many(text("x")) + b"R")
    ),
    "a size of a number": pickled(name("torch", "Size") + b"K\x01\x85R"),
    "a dict of threes": pickled(name("collections", "OrderedDict") + many(b"](" + many(b"K\x01") + b"e") + b"R"),
    "a name that is too long": pickled(b"}" + text("x" * 513) + tensor(storage()) + b"s"),
    "a name that is no text": pickled(b"}" + text("\udc80") + tensor(storage()) + b"s"),
    "bytes behind the end": GOOD + b"x",
}


@pytest.mark.parametrize("restrict", [True, False])
@pytest.mark.parametrize("kind", BAD_PICKLES)
def test_a_pickle_that_is_wrong(tmp_path: Path, kind: str, restrict: bool) -> None:
    with pytest.raises(CorruptModelCheckpointError) as caught:
        _index(tmp_path, checkpoint(BAD_PICKLES[kind]), restrict=restrict)
    assert "model.pt" in caught.value.message
    assert len(caught.value.message) < 2000


@pytest.mark.parametrize(
    "body",
    [b"]" * 200, b"}" * 200, b"(" * 200, b"]\x85" * 200, b"\x8f" * 200,
     b"]" + b"".join(b"r" + struct.pack("<I", i) for i in range(200))],
    ids=["lists", "dicts", "marks", "tuples", "sets", "kept values"],
)  # fmt: skip
def test_a_pickle_makes_only_so_many_objects(tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a byte of the file, and up to a hundred of memory."""
    monkeypatch.setattr("lading.formats.torch_save.unpickle.MAX_OBJECTS", 100)
    with pytest.raises(
        CorruptModelCheckpointError, match="at most 100 lists, dicts and tuples, and as many kept values"
    ):
        _index(tmp_path, pickled(body))


def test_a_pickle_has_only_so_many_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lading.formats.torch_save.unpickle.MAX_READS", 100)
    with pytest.raises(CorruptModelCheckpointError, match="at most 100 instructions and arguments"):
        _index(tmp_path, pickled(b"N" * 200))


def _nested(opening: bytes, closing: bytes, depth: int = 200_000) -> bytes:
    return pickled(opening * depth + b"}" + closing * depth)


BOMBS: dict[str, Callable[[], bytes]] = {
    "nested tuples": lambda: _nested(b"", b"\x85"),
    "nested lists": lambda: _nested(b"]", b"a"),
    "nested dicts": lambda: _nested(b"}" + text("k"), b"s"),
    "marks": lambda: _nested(b"(", b"t"),
    "nested keys": lambda: pickled(b"}" + b")" + b"\x85" * 200_000 + b"K\x01s"),
    "laughs": lambda: pickled(b"]q\x00" + b"".join(b"]h%ch%c\x86aq%c" % (i, i, i + 1) for i in range(200)) + b"0" * 9),
    "laughs by calls": lambda: pickled(
        b"](" + b"N" * 50_000 + b"eq\x00" + (name("torch", "Size") + b"h\x00\x85R0") * 5000
    ),
    "a list in itself": lambda: pickled(b"]q\x00h\x00a"),
    "a dict in itself": lambda: pickled(b"}q\x00" + text("model") + b"h\x00s"),
    "memo": lambda: pickled(b"}" + b"".join(b"r" + struct.pack("<I", 2**32 - 1 - i) for i in range(100_000))),
    "a place in the memo": lambda: pickled(b"}r\xff\xff\xff\xff"),
    "appends": lambda: pickled(b"]q\x00" + b"(" + b"h\x00" * 500_000 + b"e"),
    "bytes that are not there": lambda: pickled(b"\x96" + struct.pack("<Q", 1 << 40)),
    "a frame of bytes that are not there": lambda: pickled(b"\x95" + struct.pack("<Q", 1 << 40) + b"}", 4),
    "sets of sets": lambda: pickled(b"\x8f" + b"(" * 1000 + b")" + b"\x85" * 200_000 + b"\x91" * 1000),
    "a million digits": lambda: pickled(b"I" + b"9" * 1_000_000 + b"\n"),
    "states of states": lambda: pickled(b"}" + b"}b" * 200_000),
    "one tensor a hundred thousand times": lambda: pickled(
        tensor(storage()) + b"q\x020}(" + b"".join(text(f"w{i}") + b"h\x02" for i in range(100_000)) + b"u"
    ),
}  # fmt: skip


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_take_time_and_memory_in_proportion_to_their_size(tmp_path: Path, kind: str) -> None:
    # Without limits it would not take the seconds of a test, but hours; or the memory of a machine.
    _only_good_errors(tmp_path / "model.pt", checkpoint(BOMBS[kind]()), restrict=True)


def test_a_pickle_of_more_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lading.formats.torch_save.reader.MAX_PICKLE_SIZE", len(GOOD) - 1)
    with pytest.raises(CorruptModelCheckpointError, match="at most"):
        _index(tmp_path, checkpoint())
    with pytest.raises(CorruptModelCheckpointError, match="at most"):
        _index(tmp_path, save({"w": torch.ones(1)}, legacy=True))


def test_large_numbers_are_never_shown(tmp_path: Path) -> None:
    large = b"\x8b" + struct.pack("<I", 1 << 20) + b"\x7f" * (1 << 20)
    for data in (pickled(large), pickled(dictionary(w=tensor(storage().replace(number(6), large))))):
        with pytest.raises(CorruptModelCheckpointError, match="a number of more than 64 bits") as caught:
            _index(tmp_path, checkpoint(data))
        assert len(caught.value.message) < 2000


# --- archives ---

PICKLE = Member("a/data.pkl", GOOD)
RECORD = Member("a/data/0", DATA)


def _with(member: Member) -> bytes:
    return archive(*(member if member.name == m.name else m for m in (PICKLE, RECORD)))


BAD_ARCHIVES: dict[str, bytes] = {
    "nothing": b"",
    "too little": b"PK\x03\x04",
    "another format": b"GGUF" + bytes(100),
    "no record": archive(),
    "a comment": archive(PICKLE, RECORD, end={"comment": 1}, behind=b"x"),
    "bytes behind the end": archive(PICKLE, RECORD, behind=b"x" * 22),
    "fewer records than stated": archive(PICKLE, RECORD, end={"count": 3, "here": 3}),
    "more records than stated": archive(PICKLE, RECORD, end={"count": 1, "here": 1}),
    "several parts": archive(PICKLE, RECORD, end={"here": 1}),
    "a directory elsewhere": archive(PICKLE, RECORD, end={"offset": 4}),
    "a directory of another size": archive(PICKLE, RECORD, end={"size": 4}),
    "a directory beyond the end": archive(PICKLE, RECORD, end={"offset": 2**31}),
    "compressed": _with(Member("a/data/0", DATA, {"method": 8}, {"method": 8})),
    "compressed, in one header": _with(Member("a/data/0", DATA, local={"method": 8})),
    "two sizes": _with(Member("a/data/0", DATA, {"packed": 23})),
    "two sizes, in one header": _with(Member("a/data/0", DATA, local={"size": 23, "packed": 23})),
    "a size beyond the end": _with(
        Member("a/data/0", DATA, {"packed": 2**30, "size": 2**30}, {"packed": 2**30, "size": 2**30})
    ),
    "a size without its field": _with(Member("a/data/0", DATA, {"packed": 2**32 - 1, "size": 2**32 - 1})),
    "encrypted": _with(Member("a/data/0", DATA, {"flags": 0x801}, {"flags": 0x801})),
    "two names": _with(Member("a/data/0", DATA, local={"name": b"a/data/1"})),
    "two CRCs": _with(Member("a/data/0", DATA, local={"crc": 1})),
    "two flags": _with(Member("a/data/0", DATA, local={"flags": 0})),
    "a header elsewhere": _with(Member("a/data/0", DATA, at=3)),
    "a header beyond the end": _with(Member("a/data/0", DATA, at=2**31)),
    "one name twice": archive(PICKLE, RECORD, RECORD),
    "a name outside": archive(PICKLE, RECORD, Member("../b", b"")),
    "a name from the root": archive(PICKLE, RECORD, Member("/b", b"")),
    "a name of Windows": archive(PICKLE, RECORD, Member("a\\b", b"")),
    "a name that hides": archive(PICKLE, RECORD, Member("a\u202eb", b"")),
    "a name that is not UTF-8": archive(PICKLE, RECORD, Member("b", b"", {"name": b"\xff"}, {"name": b"\xff"})),
    "an empty name": archive(PICKLE, RECORD, Member("", b"")),
    "no pickle": archive(RECORD),
    "two pickles": archive(PICKLE, RECORD, Member("b/data.pkl", GOOD)),
    "a pickle with another CRC": _with(Member("a/data.pkl", GOOD, {"crc": 1}, {"crc": 1})),
    "an order of bytes that does not exist": checkpoint(byteorder=Member("a/byteorder", b"middle")),
    "fields that zipfile reads in quadratic time": _with(Member("a/data/0", DATA, {"extra": bytes(4) * 16_000})),
    "a name of 2 kB": archive(PICKLE, RECORD, Member("b" * 2000, b"")),
    "a version to come": archive(PICKLE, RECORD).replace(b"PK\x01\x02\0\0\0\0", b"PK\x01\x02\0\0\xff\0"),
    "records that overlap": archive(PICKLE, RECORD, Member("a/data/1", DATA, {"size": 24, "packed": 24}, at=0)),
}


def _zip64(data: bytes, **lies: int) -> bytes:
    """An archive with the records that end a large one, and what these say instead of the truth."""
    at = data.index(b"PK\x05\x06")
    _, _, _, here, count, size, offset, _ = struct.unpack("<4s4H2LH", data[at:])
    stated = {"here": here, "count": count, "size": size, "offset": offset, "end": at, "length": 44, "disks": 1} | lies
    end = struct.pack(
        "<4sQ2H2L4Q", b"PK\x06\x06", stated["length"], 0, 45, 0, 0,
        stated["here"], stated["count"], stated["size"], stated["offset"],
    )  # fmt: skip
    return data[:at] + end + struct.pack("<4sLQL", b"PK\x06\x07", 0, stated["end"], stated["disks"]) + data[at:]


@pytest.mark.parametrize(
    "lies",
    [
        {"count": 2**40, "here": 2**40}, {"count": 1}, {"here": 1}, {"size": 2**60}, {"size": 0}, {"offset": 2**63},
        {"offset": 0}, {"end": 0}, {"end": 2**63}, {"length": 2**60}, {"disks": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_zip64_record_that_lies(tmp_path: Path, lies: dict[str, int]) -> None:
    data = checkpoint()
    at = data.index(b"PK\x05\x06")
    wide = data[:at] + data[at : at + 8] + b"\xff" * 12 + b"\0\0"  # all numbers are where they fit
    for file in (data, wide):
        truth = _zip64(data)[: at + 76] + file[at:]
        assert list(_index(tmp_path, truth).names) == ["w"]
        with pytest.raises(CorruptModelCheckpointError):
            _index(tmp_path, _zip64(data, **lies)[: at + 76] + file[at:])


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_an_archive_that_is_wrong(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CorruptModelCheckpointError) as caught:
        _index(tmp_path, BAD_ARCHIVES[kind])
    assert "model.pt" in caught.value.message


def test_one_record_for_two_names(tmp_path: Path) -> None:
    """Two entries of the directory with one local header: a bomb of overlapping records needs that."""
    data = archive(PICKLE, RECORD, Member("a/data/1", b""))
    at = data.rindex(b"PK\x01\x02")
    (begin,) = struct.unpack_from("<L", data, data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1) + 42)
    data = data[: at + 42] + struct.pack("<L", begin) + data[at + 46 :]
    with pytest.raises(CorruptModelCheckpointError):
        _index(tmp_path, data)


def test_what_deflates(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", GOOD)
        file.writestr("a/data/0", bytes(24))
    with pytest.raises(CorruptModelCheckpointError, match="stored as they are"):
        _index(tmp_path, out.getvalue())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_truncation(tmp_path: Path, legacy: bool) -> None:
    data = save({"w": torch.arange(6.0), "v": torch.ones(2)}, legacy=legacy)
    step = 1 if legacy else 7
    for size in range(0, len(data) - 1, step):
        with pytest.raises(CorruptModelCheckpointError):
            _index(tmp_path, data[:size])


# --- tar archives ---


def _tar(path: Path, *, kind: int = tarfile.PAX_FORMAT, mode: str = "w", prefix: str = "m", data: bytes = b"") -> Path:
    with tarfile.open(path, mode, format=kind) as file:  # type: ignore[call-overload]
        for member in (f"{prefix}/notes.txt", f"{prefix}/model.pt", f"{prefix}/tail"):
            info = tarfile.TarInfo(member)
            content = data if member.endswith(".pt") else b"x" * 700
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("prefix", ["m", "./m", "é" * 60, "deep/" * 40])
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_member_is_a_range_of_the_archive(tmp_path: Path, kind: int, prefix: str, legacy: bool) -> None:
    if kind == tarfile.USTAR_FORMAT and len(prefix.encode()) > 100:
        prefix = "p" * 90 + "/" + "q" * 80
    state = {"w": torch.randn(4, 5), "v": torch.randn(4, 5).t()[:1]}
    prefix = prefix.rstrip("/")
    path = _tar(tmp_path / "a.tar", kind=kind, prefix=prefix, data=save({"w": state["w"]}, legacy=legacy))
    member = f"{prefix}/model.pt"

    manifest = formats.index(path, member=member)
    assert manifest.shards[0].name == "a.tar"
    assert manifest.shards[0].size == path.stat().st_size
    assert equal(read_all(path, manifest)["w"], state["w"])


def test_a_safetensors_member(tmp_path: Path) -> None:
    from safetensors.torch import save as save_safetensors

    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        data = save_safetensors({"w": torch.arange(6.0), "v": torch.ones(3, dtype=torch.bfloat16)})
        info = tarfile.TarInfo("m.safetensors")
        info.size = len(data)
        file.addfile(info, io.BytesIO(data))

    manifest = formats.index(path, member="m.safetensors")
    assert manifest.format == "safetensors"
    assert equal(read_all(path, manifest)["w"], torch.arange(6.0))


def test_a_strided_member_is_rewritten(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    value = torch.randn(3, 4).t()
    path = _tar(tmp_path / "a.tar", data=save({"w": value}))
    new = formats.readable(path, member="m/model.pt", cache=tmp_path / "cache")
    assert equal(load_file(new)["w"], value)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_archives(tmp_path: Path, mode: str) -> None:
    path = _tar(tmp_path / "a.tar", mode=mode, data=save({"w": torch.ones(1)}))
    with pytest.raises(NotSupportedError, match="compressed"):
        formats.index(path, member="m/model.pt")


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"S", b"Z"])
def test_members_that_are_no_regular_files(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        info = tarfile.TarInfo("m.pt")
        info.type, info.linkname = kind, "../../etc/passwd"
        file.addfile(info)
    with pytest.raises(NotSupportedError, match=r"member 'm\.pt': expected a regular file"):
        formats.index(path, member="m.pt")


def test_members_that_are_not_there_or_twice(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", data=save({"w": torch.ones(1)}))
    with pytest.raises(CheckpointNotFoundError, match=r"'m/model\.pt'"):
        formats.index(path, member="model.pt")
    with pytest.raises(NotSupportedError, match="path to a member"):
        formats.index(path)

    with tarfile.open(path, "a") as file:
        file.addfile(tarfile.TarInfo("./m/model.pt"))
    with pytest.raises(CorruptModelCheckpointError, match="another one"):
        formats.index(path, member="m/model.pt")


@pytest.mark.parametrize(
    ("at", "new"),
    [(124, b"00000000009"), (124, b"\x80" + b"\xff" * 11), (148, b"0000000\0"), (257, b"USTAR"), (124, b"9" * 11)],
)
def test_headers_that_lie(tmp_path: Path, at: int, new: bytes) -> None:
    path = _tar(tmp_path / "a.tar", kind=tarfile.USTAR_FORMAT, data=save({"w": torch.ones(1)}))
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    if at != 148:
        data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    path.write_bytes(data)
    with pytest.raises(CorruptModelCheckpointError, match="tar header"):
        formats.index(path, member="m/model.pt")


def _extended(path: Path, kind: bytes, data: bytes, name: str = "m.pt") -> Path:
    """An archive of one member behind an extended header."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for member, content in (("x", data), (name, save({"w": torch.ones(1)}))):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            info.type = kind if member == "x" else tarfile.REGTYPE
            file.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize(
    "data",
    [
        b"16 size=9999999\n", b"12 size=-99\n", b"12 size=1_0\n", b"10 size=99\n", b"size=99\n",
        b"0 a=b\n", b"-6 a=b\n", b"6 a=b ", b"6 abc\n", b"99999999 a=b\n", b"2 " * 400_000 + b"=\n", b"1" * 900_000,
        b"900000 a=" + b"1" * 899_990 + b" hdrcharset", b"a" * 1_000_001,
    ],
    ids=lambda data: repr(data[:20]),
)  # fmt: skip
def test_pax_headers_that_lie(tmp_path: Path, kind: bytes, data: bytes) -> None:
    """As they are refused quickly: tarfile needs minutes, or all memory, for some of them."""
    with pytest.raises(CorruptModelCheckpointError, match="tar header"):
        formats.index(_extended(tmp_path / "a.tar", kind, data), member="m.pt")


def test_a_pax_header_of_many_digits(tmp_path: Path) -> None:
    """A record that is as it should be, in which Python 3.11's tarfile looks for another one in quadratic time."""
    path = _extended(tmp_path / "a.tar", tarfile.XHDTYPE, b"900010 a=" + b"1" * 900_000 + b"\n")
    assert list(formats.index(path, member="m.pt").names) == ["w"]


@pytest.mark.parametrize("data", [b"10 path=a\n", b"11 size=10\n", b"20 GNU.sparse.size=1\n"])
def test_a_name_or_a_size_that_holds_for_all_members(tmp_path: Path, data: bytes) -> None:
    data = b"%d %s" % (len(data), data.partition(b" ")[2])
    with pytest.raises(CorruptModelCheckpointError, match="holds for all members"):
        formats.index(_extended(tmp_path / "a.tar", tarfile.XGLTYPE, data), member="m.pt")


def test_a_sparse_member_of_a_pax_header(tmp_path: Path) -> None:
    data = b"21 GNU.sparse.major=1\n"
    data = b"%d %s" % (len(data), data.partition(b" ")[2])
    with pytest.raises(NotSupportedError, match="a sparse file"):
        formats.index(_extended(tmp_path / "a.tar", tarfile.XHDTYPE, data), member="m.pt")


def test_a_size_below_zero_and_a_chain_of_headers(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", kind=tarfile.USTAR_FORMAT, data=save({"w": torch.ones(1)}))
    data = bytearray(path.read_bytes())
    data[124:136] = b"\xff" * 10 + b"\xfe\0"  # -512, which leads from the header to itself
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    path.write_bytes(data)
    with pytest.raises(CorruptModelCheckpointError, match=r"tar header at 0: .* 0 or more bytes"):
        formats.index(path, member="m/model.pt")

    header = tarfile.TarInfo("x")
    header.type = tarfile.GNUTYPE_LONGNAME
    path.write_bytes(header.tobuf() * 10_000 + bytes(1024))
    with pytest.raises(CheckpointNotFoundError):
        formats.index(path, member="m/model.pt")


def test_truncated_archives(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", data=save({"w": torch.ones(1)}))
    data = path.read_bytes()
    end = data.rindex(b"x") + 1
    for size in range(0, end, 97):
        path.write_bytes(data[:size])
        with pytest.raises(CorruptModelCheckpointError):
            formats.index(path, member="m/model.pt")


# --- anything ---

SEEDS = {
    "zip": save({"model": {"w": torch.arange(6.0), "v": torch.nn.Parameter(torch.ones(2))}, "step": 3, "n": [1, (2,)]}),
    "legacy": save({"w": torch.arange(6.0), "v": torch.ones(2)}, legacy=True),
    "by hand": checkpoint(),
}
_MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "insert", "copy"]), st.integers(0, 4000), st.binary(max_size=9)),
    max_size=6,
)


def _mutate(data: bytes, mutations: list[tuple[str, int, bytes]]) -> bytes:
    for kind, at, new in mutations:
        at %= len(data) + 1
        if kind == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "cut":
            data = data[:at] + data[at + len(new) :]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        else:
            data = data[:at] + data[at // 2 : at // 2 + len(new)] + data[at + len(new) :]
    return data


def _only_good_errors(path: Path, data: bytes, restrict: bool, member: str | None = None) -> None:
    path.write_bytes(data)
    try:
        manifest = formats.index(path, member=member, restrict=restrict)
    except (CorruptModelCheckpointError, PolicyError, NotSupportedError) as error:
        message = error.message
    except CheckpointNotFoundError as error:
        message = error.message if member is not None else "x" * 3000
    else:
        message = ""
        for t in manifest:
            assert 0 <= t.offset <= t.offset + t.nbytes <= len(data)
    assert len(message) < 3000


@given(st.sampled_from(sorted(SEEDS)), _MUTATIONS, st.booleans())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files(tmp_path: Path, seed: str, mutations: list[tuple[str, int, bytes]], restrict: bool) -> None:
    _only_good_errors(tmp_path / "model.pt", _mutate(SEEDS[seed], mutations), restrict)


_OPCODES = st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes])
_PARTS = st.one_of(
    _OPCODES,
    st.binary(max_size=4),
    st.sampled_from(
        [
            storage(),
            tensor(storage()),
            text("model"),
            number(3),
            name("torch._utils", "_rebuild_tensor_v2"),
            name("torch._utils", "_rebuild_parameter"),
            name("torch._tensor", "_rebuild_from_type_v2"),
            name("collections", "OrderedDict"),
            name("torch", "Size"),
            name("os", "system"),
            b"}(",
            b"q\x00",
            b"h\x00",
        ]
    ),
)


@given(st.lists(_PARTS, max_size=30).map(b"".join), st.booleans())
@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_pickle(tmp_path: Path, instructions: bytes, restrict: bool) -> None:
    _only_good_errors(tmp_path / "model.pt", checkpoint(pickled(instructions)), restrict)
    _only_good_errors(
        tmp_path / "model.pt", checkpoint(pickled(dictionary(w=tensor(storage())) + instructions)), restrict
    )


@given(_MUTATIONS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_archives(tmp_path: Path, mutations: list[tuple[str, int, bytes]]) -> None:
    path = _tar(tmp_path / "a.tar", data=SEEDS["by hand"])
    _only_good_errors(path, _mutate(path.read_bytes(), mutations), True, "m/model.pt")
