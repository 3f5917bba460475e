"""One test for each lie that a safetensors file, or the index of several, can tell."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import lading.formats.safetensors as module
from lading import formats
from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError, LadingError
from lading.formats.files import open_regular

pytestmark = pytest.mark.timeout(60)

INDEX = "model.safetensors.index.json"


def file_bytes(header: str | bytes, data: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def refused(path: Path, *parts: str) -> CorruptModelCheckpointError:
    """``path`` is refused with a message that names it and has all of ``parts``."""
    with pytest.raises(CorruptModelCheckpointError) as caught:
        formats.index(path)

    message = str(caught.value)
    assert message.startswith(str(caught.value.path))
    for part in ("expected", "found", *parts):
        assert part in message
    assert len(message) < 4000
    assert message.replace("\n", "").isprintable()

    return caught.value


def tensor(value: str, name: str = "a") -> str:
    return f'{{"{name}":{value}}}'


U8 = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
DEEP = 100_000

# name: header, bytes behind it, what the message must say
LIES: dict[str, tuple[str | bytes, int, tuple[str, ...]]] = {
    # the text
    "empty": ("", 0, ("header", "'{'", "empty")),
    "space first": (" {}", 0, ("header", "'{'", "' '")),
    "byte order mark": ("\ufeff{}", 0, ("header", "'{'")),
    "a list": ("[]", 0, ("header", "'{'", "'['")),
    "newline as padding": ("{}\n", 0, ("header", "spaces", r"\n")),
    "zero bytes as padding": ("{}\0\0", 0, ("header", "spaces", r"\x00")),
    "open end": ('{"a":', 0, ("header",)),
    "two documents": ("{}{}", 0, ("header", "only spaces", "'{}'")),
    "comma too many": (f'{{"a":{U8},}}', 1, ("header, a key", "a string", "'}'")),
    "comma too few": (f'{{"a":{U8} "b":{U8}}}', 1, ("header", "','")),
    "no colon": ('{"a"}', 0, ("header", "':'")),
    "comment": ("{/**/}", 0, ("header",)),
    "single quotes": ("{'a':1}", 0, ("header", "a string")),
    "key that is a number": ("{1:2}", 0, ("header", "a string", "'1'")),
    "not UTF-8": (b'{"\xff":1}', 0, ("header", "UTF-8", "0xff", "position 2")),
    "encoded surrogate": (b'{"\xed\xa0\x80":1}', 0, ("header", "UTF-8", "0xed")),
    "overlong encoding": (b'{"\xc0\x80":1}', 0, ("header", "UTF-8", "0xc0")),
    "unpaired surrogate": (f'{{"\\ud800":{U8}}}', 1, ("header", "surrogate")),
    "unpaired low surrogate": (f'{{"x\\udc00y":{U8}}}', 1, ("header", "surrogate")),
    "control character": (f'{{"\x01":{U8}}}', 1, ("header", "control character")),
    "unknown escape": (f'{{"\\x41":{U8}}}', 1, ("header", "escape")),
    "short escape": (f'{{"\\u12":{U8}}}', 1, ("header", "escape")),
    "string without end": ('{"a}', 0, ("header", "Unterminated")),
    # names
    "name twice": (f'{{"a":{U8},"a":{U8}}}', 1, ("header", "once", "'a' twice")),
    "name twice, once escaped": (f'{{"a":{U8},"\\u0061":{U8}}}', 1, ("header", "once", "'a' twice")),
    "name of 513 bytes": (tensor(U8, "n" * 513), 1, ("'nnn", "512 bytes", "513")),
    "name of 257 characters, 514 bytes": (tensor(U8, "é" * 257), 1, ("'éé", "512 bytes", "514")),
    # __metadata__
    "metadata twice": ('{"__metadata__":{},"__metadata__":{}}', 0, ("'__metadata__' twice",)),
    "metadata twice, once escaped": ('{"__metadata__":{},"\\u005f_metadata__":{}}', 0, ("'__metadata__' twice",)),
    "metadata null": ('{"__metadata__":null}', 0, ("__metadata__", "'{'", "null")),
    "metadata list": ('{"__metadata__":[]}', 0, ("__metadata__", "'{'", "'['")),
    "metadata that is a tensor": (tensor(U8, "__metadata__"), 1, ("__metadata__, 'shape'", "a string", "'['")),
    "metadata with a number": ('{"__metadata__":{"a":1}}', 0, ("__metadata__, 'a'", "a string", "'1'")),
    "metadata with null": ('{"__metadata__":{"a":null}}', 0, ("__metadata__, 'a'", "a string", "null")),
    "metadata in depth": ('{"__metadata__":{"a":{}}}', 0, ("__metadata__, 'a'", "a string", "'{'")),
    "metadata key twice": ('{"__metadata__":{"a":"","a":""}}', 0, ("__metadata__", "'a' twice")),
    "metadata with a surrogate": ('{"__metadata__":{"a":"\\udfff"}}', 0, ("__metadata__, 'a'", "surrogate")),
    # the value of a tensor
    "tensor null": (tensor("null"), 0, ("tensor 'a'", "'{'", "null")),
    "tensor as a list": (tensor('["U8",[1],[0,1]]'), 1, ("tensor 'a'", "'{'", "'['")),
    "tensor as a string": (tensor('"U8"'), 1, ("tensor 'a'", "'{'", "U8")),
    "no fields": (tensor("{}"), 0, ("tensor 'a'", "dtype, shape and data_offsets", "none")),
    "no dtype": (tensor('{"shape":[1],"data_offsets":[0,1]}'), 1, ("tensor 'a'", "found shape, data_offsets")),
    "no shape": (tensor('{"dtype":"U8","data_offsets":[0,1]}'), 1, ("tensor 'a'", "found dtype, data_offsets")),
    "no data_offsets": (tensor('{"dtype":"U8","shape":[1]}'), 1, ("tensor 'a'", "found dtype, shape")),
    "old name of data_offsets": (
        tensor('{"dtype":"U8","shape":[1],"offsets":[0,1]}'),
        1,
        ("tensor 'a'", "data_offsets", "'offsets'"),
    ),
    "unknown field": (tensor(U8[:-1] + ',"x":0}'), 1, ("tensor 'a'", "only", "'x'")),
    "dtype twice": (tensor(U8[:-1] + ',"dtype":"U8"}'), 1, ("tensor 'a'", "'dtype' twice")),
    "shape twice": (tensor(U8[:-1] + ',"shape":[1]}'), 1, ("tensor 'a'", "'shape' twice")),
    "data_offsets twice": (
        tensor('{"data_offsets":[0,1],"dtype":"U8","shape":[1],"data_offsets":[0,1]}'),
        1,
        ("tensor 'a'", "'data_offsets' twice"),
    ),
    # dtype
    "unknown dtype": (tensor(U8.replace("U8", "F7")), 1, ("tensor 'a', dtype", "BF16", "'F7'")),
    "dtype in small letters": (tensor(U8.replace("U8", "u8")), 1, ("tensor 'a', dtype", "'u8'")),
    "dtype with a space": (tensor(U8.replace("U8", "U8 ")), 1, ("tensor 'a', dtype", "'U8 '")),
    "dtype that ends the text": (
        tensor('{"dtype":"U8\\","shape":[1],"data_offsets":[0,1]}'),
        1,
        ("tensor 'a', dtype", "one of"),
    ),
    "dtype number": (tensor(U8.replace('"U8"', "8")), 1, ("tensor 'a', dtype", "a string", "'8'")),
    "dtype as an enum object": (tensor(U8.replace('"U8"', '{"U8":null}')), 1, ("tensor 'a', dtype", "a string")),
    # shape
    "shape null": (tensor(U8.replace("[1]", "null")), 1, ("tensor 'a', shape", "integers", "null")),
    "shape a number": (tensor(U8.replace("[1]", "1")), 1, ("tensor 'a', shape", "integers", "'1'")),
    "shape a string": (tensor(U8.replace("[1]", '"1"')), 1, ("tensor 'a', shape", "integers")),
    "shape an object": (tensor(U8.replace("[1]", "{}")), 1, ("tensor 'a', shape", "integers", "'{'")),
    "shape without end": (tensor(U8.replace("[1]", "[1")), 1, ("tensor 'a', shape", "integers", "data_offsets")),
    "shape with a bracket that does not match": (tensor(U8.replace("[1]", "[1}")), 1, ("tensor 'a', shape", "'}'")),
    "size negative": (tensor(U8.replace("[1]", "[-1]")), 1, ("tensor 'a', shape", "from 0", "'-1'")),
    "two sizes negative": (tensor(U8.replace("[1]", "[-1,-1]")), 1, ("tensor 'a', shape", "from 0", "'-1'")),
    "size minus zero": (tensor(U8.replace("[1]", "[-0]")), 1, ("tensor 'a', shape", "from 0", "'-0'")),
    "size a float": (tensor(U8.replace("[1]", "[1.0]")), 1, ("tensor 'a', shape", "integers", "'1.0'")),
    "size with an exponent": (tensor(U8.replace("[1]", "[1e0]")), 1, ("tensor 'a', shape", "integers", "'1e0'")),
    "size with a leading zero": (tensor(U8.replace("[1]", "[01]")), 1, ("tensor 'a', shape", "integers", "'01'")),
    "size with a sign": (tensor(U8.replace("[1]", "[+1]")), 1, ("tensor 'a', shape", "integers", "'+1'")),
    "size in other digits": (tensor(U8.replace("[1]", "[١]")), 1, ("tensor 'a', shape", "integers")),
    "size in hexadecimal": (tensor(U8.replace("[1]", "[0x1]")), 1, ("tensor 'a', shape", "integers", "0x1")),
    "size with underscores": (tensor(U8.replace("[1]", "[1_0]")), 1, ("tensor 'a', shape", "integers", "1_0")),
    "size true": (tensor(U8.replace("[1]", "[true]")), 1, ("tensor 'a', shape", "integers", "true")),
    "size null": (tensor(U8.replace("[1]", "[null]")), 1, ("tensor 'a', shape", "integers", "null")),
    "size NaN": (tensor(U8.replace("[1]", "[NaN]")), 1, ("tensor 'a', shape", "integers", "NaN")),
    "size Infinity": (tensor(U8.replace("[1]", "[Infinity]")), 1, ("tensor 'a', shape", "integers", "Infinity")),
    "size a string": (tensor(U8.replace("[1]", '["1"]')), 1, ("tensor 'a', shape", "integers")),
    "shape in shape": (tensor(U8.replace("[1]", "[[1]]")), 1, ("tensor 'a', shape", "integers", "'['")),
    "size of 2^63": (tensor(U8.replace("[1]", f"[0,{2**63}]")), 0, ("tensor 'a', shape", "2^63", str(2**63))),
    "size of 2^64 - 1": (tensor(U8.replace("[1]", f"[0,{2**64 - 1}]")), 0, ("tensor 'a', shape", "2^63")),
    "size of 2^64 + 1": (tensor(U8.replace("[1]", f"[{2**64 + 1}]")), 1, ("tensor 'a', shape", "2^63")),
    "size of 5000 digits": (tensor(U8.replace("[1]", f"[{'1' * 5000}]")), 1, ("tensor 'a', shape", "2^63", "1111")),
    "size of a million digits": (tensor(U8.replace("[1]", f"[{'1' * 10**6}]")), 1, ("tensor 'a', shape", "2^63")),
    "rank 65": (tensor(U8.replace("[1]", f"[{'1,' * 64}1]")), 1, ("tensor 'a', shape", "at most 64", "more")),
    "rank of a million": (tensor(U8.replace("[1]", f"[{'1,' * 10**6}1]")), 1, ("tensor 'a', shape", "at most 64")),
    "elements overflow": (
        tensor(U8.replace("[1]", f"[{2**32},{2**32}]")),
        1,
        ("tensor 'a', shape", "2^63", str(2**32)),
    ),
    "elements overflow to the right number": (
        tensor(U8.replace("[1]", f"[{2**32 + 1},{2**32},{2**32}]")),
        1,
        ("tensor 'a', shape", "2^63"),
    ),
    "elements overflow before a zero": (
        tensor('{"dtype":"U8","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}'),
        0,
        ("tensor 'a', shape", "2^63"),
    ),
    "strides overflow behind a zero": (
        tensor('{"dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}'),
        0,
        ("tensor 'a', shape", "2^63"),
    ),
    "bits overflow": (
        tensor(U8.replace("U8", "C64").replace("[1]", f"[{2**58}]")),
        1,
        ("tensor 'a', shape", "2^63", "C64"),
    ),
    "half a byte": (tensor(U8.replace("U8", "F4")), 1, ("tensor 'a', shape", "whole bytes", "4 bits")),
    "three quarters of a byte": (tensor(U8.replace("U8", "F6_E2M3")), 1, ("tensor 'a', shape", "6 bits")),
    # data_offsets
    "offsets null": (tensor(U8.replace("[0,1]", "null")), 1, ("tensor 'a', data_offsets", "null")),
    "offsets empty": (tensor(U8.replace("[0,1]", "[]")), 1, ("tensor 'a', data_offsets", "[begin, end]", "[]")),
    "one offset": (tensor(U8.replace("[0,1]", "[0]")), 1, ("tensor 'a', data_offsets", "[begin, end]", "[0]")),
    "three offsets": (tensor(U8.replace("[0,1]", "[0,1,1]")), 1, ("tensor 'a', data_offsets", "at most 2")),
    "offsets negative": (tensor(U8.replace("[0,1]", "[-1,0]")), 1, ("tensor 'a', data_offsets", "from 0", "'-1'")),
    "offset minus zero": (tensor(U8.replace("[0,1]", "[-0,1]")), 1, ("tensor 'a', data_offsets", "'-0'")),
    "offset a float": (tensor(U8.replace("[0,1]", "[0,1.0]")), 1, ("tensor 'a', data_offsets", "'1.0'")),
    "offset true": (tensor(U8.replace("[0,1]", "[false,true]")), 1, ("tensor 'a', data_offsets", "false")),
    "offset of 2^63": (tensor(U8.replace("[0,1]", f"[0,{2**63}]")), 1, ("tensor 'a', data_offsets", "2^63")),
    "offset of 2^64": (tensor(U8.replace("[0,1]", f"[{2**64},{2**64 + 1}]")), 1, ("tensor 'a', data_offsets", "2^63")),
    "offset of 5000 digits": (tensor(U8.replace("[0,1]", f"[0,{'9' * 5000}]")), 1, ("tensor 'a', data_offsets", "999")),
    "end before begin": (
        tensor(U8.replace("[0,1]", "[1,0]")),
        1,
        ("tensor 'a', data_offsets", "begin ≤ end", "[1, 0]"),
    ),
    "too short": (tensor(U8.replace("[1]", "[2]")), 1, ("tensor 'a'", "2 bytes apart", "U8 of shape [2]", "[0, 1]")),
    "too long": (tensor(U8.replace("[0,1]", "[0,2]")), 2, ("tensor 'a'", "1 bytes apart", "[0, 2]")),
    "empty tensor with bytes": (tensor(U8.replace("[1]", "[0]")), 1, ("tensor 'a'", "0 bytes apart", "[0, 1]")),
    "beyond the file": (tensor(U8.replace("[0,1]", "[9,10]")), 1, ("tensor 'a'", "within the 1 bytes", "[9, 10]")),
    "beyond any file": (
        tensor(U8.replace("[0,1]", f"[{2**63 - 2},{2**63 - 1}]")),
        1,
        ("tensor 'a'", "within the 1 bytes", str(2**63 - 2)),
    ),
    # all tensors together
    "hole at the beginning": (tensor(U8.replace("[0,1]", "[1,2]")), 2, ("tensor 'a'", "at 0", "hole of 1")),
    "hole": (
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[3,4]}}',
        4,
        ("tensor 'b'", "at 1", "'a' ends", "hole of 2"),
    ),
    "overlap": (
        '{"b":{"dtype":"U8","shape":[3],"data_offsets":[2,5]},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}',
        5,
        ("tensor 'b'", "at 3", "'a' ends", "overlap of 1"),
    ),
    "the same bytes twice": (f'{{"a":{U8},"b":{U8}}}', 1, ("tensor 'b'", "at 1", "overlap of 1")),
    "empty tensor within another": (
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}}',
        4,
        ("tensor 'b'", "at 4", "overlap of 2"),
    ),
    "bytes behind the last tensor": (tensor(U8), 2, ("tensor 'a', the last", "all of the 2 bytes", "end at 1")),
    "bytes and no tensor": ("{}", 1, ("header", "all of the 1 bytes", "end at 0")),
    # bombs
    "depth, in place of a tensor": (tensor("[" * DEEP), 0, ("tensor 'a'", "'['")),
    "depth, in a shape": (tensor(U8.replace("[1]", "[" * DEEP + "]" * DEEP)), 1, ("tensor 'a', shape", "'['")),
    "depth, in an unknown field": (tensor('{"x":' + '{"x":' * DEEP + "0" + "}" * DEEP + "}"), 0, ("tensor 'a'", "'x'")),
    "depth, in metadata": ('{"__metadata__":' + '{"a":' * DEEP + "}" * DEEP + "}", 0, ("__metadata__, 'a'", "'{'")),
    "a million values": (tensor("[" + "[]," * 10**6 + "[]]"), 0, ("tensor 'a'", "'['")),
}


@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies(tmp_path: Path, lie: str) -> None:
    header, size, parts = LIES[lie]
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes(header, bytes(size)))

    error = refused(path, str(path), *parts)

    assert error.path == str(path)


def test_a_lie_is_found_among_the_honest(tmp_path: Path) -> None:
    """The text of a dtype and a shape that was right before does not excuse what follows it."""
    for bad in (
        '{"dtype":"U8","shape":[2],"data_offsets":[2,5]}',
        '{"dtype":"U8","shape":[2],"data_offsets":[02,4]}',
        '{"dtype":"U8","shape":[2],"data_offsets":[-0,2]}',
        '{"dtype":"U8","shape":[2],"data_offsets":[2,4],"x":1}',
        '{"data_offsets":[2,4],"dtype":"U8","shape":[2],"data_offsets":[2,4]}',
        '{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[2,4]}',
        '{"dtype":"U8","shape":[2],"data_offsets":[2,4]]',
        '{"dtype":"U8","shape":[2],"data_offsets":[2,9223372036854775808]}',
    ):
        path = tmp_path / "model.safetensors"
        good = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
        path.write_bytes(file_bytes(f'{{"good":{good},"bad":{bad}}}', bytes(4)))
        refused(path, "tensor 'bad'" if not bad.endswith("]") else "bad")


@pytest.mark.parametrize(
    ("begin", "unit", "end"),
    [
        ('{"a":[', "[],", "]}"),
        ('{"a":{"dtype":[', "[],", "]}}"),
        ('{"a":{"dtype":"U8","shape":[', "[],", "]}}"),
        ('{"a":{"dtype":"U8","shape":[', "999,", "1]}}"),
        ('{"a":{"data_offsets":{', '"a":1,', '"b":1}}}'),
        ('{"a":{', '"a":1,', '"b":1}}'),
        ('{"__metadata__":{"a":[', "{},", "{}]}}"),
        ("{", '"a":1,', '"b":1}'),
    ],
)
def test_a_lie_is_refused_before_what_follows_is_decoded(begin: str, unit: str, end: str) -> None:
    data = f"{begin}{unit * (1_000_000 // len(unit))}{end}".encode()

    tracemalloc.start()
    with pytest.raises(CorruptModelCheckpointError):
        module.parse_header(data, buffer_size=1, label="x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 2 * len(data)


def test_names_do_not_reach_the_terminal_raw(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes('{"\\u001b[31m\\u202e":{"dtype":"U9"}}'))

    refused(path, r"\x1b[31m\u202e")


# --- the file --------------------------------------------------------------------------------------------------------


def test_every_truncation(tmp_path: Path) -> None:
    whole = file_bytes('{"__metadata__":{"a":"b"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  ', bytes(8))
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole)
    assert formats.index(path).names == ["w"]

    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(path, str(path))

    path.write_bytes(whole + b"\0")
    refused(path, "tensor 'w', the last", "all of the 9 bytes")


@pytest.mark.parametrize("length", [3, 100_000_001, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_header_length(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")

    refused(path, "header length", "at most 2 bytes", "the file has 10", str(length))


def test_header_of_more_than_100_mb(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{}")
    os.truncate(path, 200_000_000)  # a sparse file: it takes no room

    refused(path, "header length", "at most 100000000 bytes", "100000001")


def test_header_length_in_the_wrong_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack(">Q", 2) + b"{}")

    refused(path, "header length")


def special_files(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Things that are no regular files, and what the message calls each."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link to fifo").symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket")  # in the current folder: the length of a socket's path is limited

    return {
        "fifo": (tmp_path / "fifo", "a FIFO"),
        "folder": (tmp_path / "folder", "a folder"),
        "zero": (tmp_path / "zero", "a character device"),
        "loop": (tmp_path / "loop", "form a cycle"),
        "link to fifo": (tmp_path / "link to fifo", "a FIFO"),
        "socket": (tmp_path / "socket", "a socket"),
    }


@pytest.mark.timeout(20)
@pytest.mark.parametrize("place", ["path", "single", "index", "shard"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, (target, found) in special_files(tmp_path).items():
        folder = tmp_path / f"with {kind}"
        folder.mkdir()
        if place == "path":
            if kind != "folder":  # which is a fine path
                refused(target, "a regular file", found, str(target))
            continue

        name = {"single": "model.safetensors", "index": INDEX, "shard": "model-1.safetensors"}[place]
        (folder / name).symlink_to(target)
        if place == "shard":
            (folder / INDEX).write_text('{"weight_map":{"a":"model-1.safetensors"}}')
        refused(folder, "a regular file", found, name)


@pytest.mark.timeout(20)
def test_a_fifo_that_takes_the_place_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fifo = tmp_path / "model.safetensors", tmp_path / "fifo"
    path.write_bytes(file_bytes("{}"))
    os.mkfifo(fifo)
    stat = os.stat

    def stat_then_swap(target: Any, **kwargs: Any) -> os.stat_result:
        result = stat(target, **kwargs)
        if os.path.lexists(fifo):
            fifo.rename(path)
        return result

    with monkeypatch.context() as patch:
        patch.setattr("lading.formats.files.os.stat", stat_then_swap)
        with pytest.raises(CorruptModelCheckpointError, match="a FIFO"), open_regular(path):
            pass


@pytest.mark.parametrize("change", [b"", b"{}", b"more"])
def test_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes("{}"))
    parse = module.parse_header

    def write_and_parse(data: bytes, **kwargs: Any) -> module.Header:
        path.write_bytes(change)
        return parse(data, **kwargs)

    monkeypatch.setattr(module, "parse_header", write_and_parse)

    refused(path, "does not change", f"has {len(change)} bytes")


def test_file_that_shrinks_before_its_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes("{" + " " * 100_000 + "}"))
    measure = module.header_length

    def measure_and_truncate(prefix: bytes, **kwargs: Any) -> int:
        os.truncate(path, 50_000)
        return measure(prefix, **kwargs)

    monkeypatch.setattr(module, "header_length", measure_and_truncate)

    refused(path, "does not change", "has 50000 bytes")


def test_errors_of_the_system_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes("{}"))

    def denied(target: Any, *args: Any, **kwargs: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(target))

    with monkeypatch.context() as patch:
        patch.setattr("lading.formats.files.os.open", denied)
        with pytest.raises(PermissionError) as caught:
            formats.index(tmp_path)
    assert caught.value.filename == str(path)

    with pytest.raises(OSError, match=r"model\.safetensors") as failed, open_regular(path):
        raise OSError(errno.EIO, "Input/output error")
    assert not isinstance(failed.value, LadingError)

    with pytest.raises(OSError, match="too long"):
        formats.index(tmp_path / ("x" * 300))


# --- the index -------------------------------------------------------------------------------------------------------


def write_index(folder: Path, text: str | bytes | dict[str, Any]) -> None:
    data = text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
    (folder / INDEX).write_bytes(data)


def write_shard(folder: Path, file: str, *names: str) -> None:
    header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)}
    (folder / file).write_bytes(file_bytes(json.dumps(header), bytes(len(names))))


INDEX_LIES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty": ("", ("index", "'{'", "end of the text")),
    "a list": ("[]", ("index", "'{'", "'['")),
    "byte order mark": ('\ufeff{"weight_map":{}}', ("index", "'{'")),
    "not UTF-8": (b'{"weight_map":{"\xff":"a.safetensors"}}', ("index", "UTF-8", "0xff")),
    "no weight_map": ('{"metadata":{}}', ("index", "weight_map", "none")),
    "weight_map empty": ('{"weight_map":{}}', ("index", "weight_map", "empty")),
    "weight_map twice": ('{"weight_map":{"a":"a.safetensors"},"weight_map":{}}', ("index", "'weight_map' twice")),
    "weight_map null": ('{"weight_map":null}', ("weight_map", "'{'", "null")),
    "weight_map list": ('{"weight_map":["a.safetensors"]}', ("weight_map", "'{'", "'['")),
    "tensor twice": ('{"weight_map":{"a":"a.safetensors","a":"a.safetensors"}}', ("weight_map", "'a' twice")),
    "file a number": ('{"weight_map":{"a":1}}', ("weight_map, 'a'", "a string", "'1'")),
    "file null": ('{"weight_map":{"a":null}}', ("weight_map, 'a'", "a string", "null")),
    "file a list": ('{"weight_map":{"a":["a.safetensors"]}}', ("weight_map, 'a'", "a string", "'['")),
    "surrogate": ('{"weight_map":{"\\ud800":"a.safetensors"}}', ("weight_map", "surrogate")),
    "open end": ('{"weight_map":{"a":"a.safetensors"}', ("index", "','")),
    "two documents": ('{"weight_map":{"a":"a.safetensors"}} {}', ("index", "nothing more")),
    "metadata list": ('{"metadata":[],"weight_map":{"a":"a.safetensors"}}', ("metadata", "an object", "'['")),
    "metadata key twice": ('{"metadata":{"a":1,"a":2}}', ("metadata", "'a' twice")),
    "metadata key twice in depth": ('{"metadata":{"b":[{"a":1,"a":2}]}}', ("metadata", "'a' twice")),
    "metadata NaN": ('{"metadata":{"a":NaN}}', ("metadata", "a value", "NaN")),
    "metadata leading zero": ('{"metadata":{"a":01}}', ("metadata", "a value", "01")),
    "metadata bare word": ('{"metadata":{"a":truer}}', ("metadata", "a value", "truer")),
    "metadata comma too many": ('{"metadata":{"a":[1,]}}', ("metadata", "a value", "']'")),
    "depth": ('{"metadata":{"a":' + "[" * DEEP + "]" * DEEP + "}}", ("metadata", "levels of nesting")),
    "depth of objects": ('{"x":' + '{"x":' * DEEP, ("'x'", "levels of nesting")),
}


@pytest.mark.parametrize("lie", INDEX_LIES)
def test_index_that_lies(tmp_path: Path, lie: str) -> None:
    text, parts = INDEX_LIES[lie]
    write_index(tmp_path, text)
    write_shard(tmp_path, "a.safetensors", "a")

    refused(tmp_path, str(tmp_path / INDEX), *parts)


@pytest.mark.parametrize("innermost", ['{"a":"[[{"}', "[-1.5e400]", "[]"])
def test_values_of_free_form_have_at_most_32_levels(tmp_path: Path, innermost: str) -> None:
    write_shard(tmp_path, "a.safetensors", "a")
    write_index(tmp_path, f'{{"x":{"[" * 31}{innermost}{"]" * 31},"weight_map":{{"a":"a.safetensors"}}}}')
    assert formats.index(tmp_path).names == ["a"]

    write_index(tmp_path, f'{{"x":{"[" * 32}{innermost}{"]" * 32},"weight_map":{{"a":"a.safetensors"}}}}')
    refused(tmp_path, "'x'", "32 levels of nesting", "more")


@pytest.mark.few(1)
@pytest.mark.parametrize("value", [f'"{"x" * 9_999_998}"', f"[{'1,' * 4_999_998}12]"], ids=["string", "list"])
def test_values_of_free_form_have_at_most_10_mb(tmp_path: Path, value: str) -> None:
    write_shard(tmp_path, "a.safetensors", "a")
    write_index(tmp_path, f'{{"x":{value},"weight_map":{{"a":"a.safetensors"}}}}')
    assert formats.index(tmp_path).names == ["a"]

    write_index(tmp_path, f'{{"x":{value[0]}1{value[1:]},"weight_map":{{"a":"a.safetensors"}}}}')
    refused(tmp_path, "'x'", "at most 10000000 characters")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".safetensors/",
        "../outside.safetensors",
        "sub/a.safetensors",
        "./a.safetensors",
        "/etc/a.safetensors",
        "sub\\a.safetensors",
        "..\\a.safetensors",
        "C:\\a.safetensors",
        "a.safetensors\0",
        "\0a.safetensors",
        "a\n.safetensors",
        "a\x1b[2J.safetensors",
        "a\x7f.safetensors",
        "a\x85.safetensors",
        "a\u2028.safetensors",
        "gnp\u202e.safetensors",
        "a\u200b.safetensors",
        "a.safetensors ",
        "a.bin",
        "a.pt",
        "passwd",
        INDEX,
        "é" * 122 + ".safetensors",
    ],
)
def test_index_that_names_what_is_no_plain_file(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    write_shard(tmp_path, "outside.safetensors", "a")
    write_shard(folder, "a.safetensors", "a")
    write_shard(folder / "sub", "a.safetensors", "a")
    write_index(folder, {"weight_map": {"a": name}})

    refused(folder, str(folder / INDEX), "weight_map", "plain file names", repr(name[:80]))


def test_index_of_more_than_100_mb(tmp_path: Path) -> None:
    write_index(tmp_path, "{}")
    os.truncate(tmp_path / INDEX, 100_000_001)  # a sparse file: it takes no room

    refused(tmp_path, str(tmp_path / INDEX), "at most 100000000 bytes", "100000001")


def test_missing_shards_are_named_together(tmp_path: Path) -> None:
    write_shard(tmp_path, "2.safetensors", "b")
    (tmp_path / "3.safetensors").symlink_to("gone")
    write_index(tmp_path, {"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}})

    error = refused(
        tmp_path, str(tmp_path / INDEX), "2 disagreements", "'1.safetensors' is missing", "'3.safetensors' is missing"
    )

    assert not isinstance(error, CheckpointNotFoundError)
    assert "2.safetensors" not in str(error)


def test_shards_and_index_that_disagree(tmp_path: Path) -> None:
    write_shard(tmp_path, "1.safetensors", "both", "moved", "extra")
    write_shard(tmp_path, "2.safetensors", "both", "good")
    write_index(
        tmp_path,
        {
            "weight_map": {
                "both": "1.safetensors",
                "moved": "2.safetensors",
                "good": "2.safetensors",
                "absent": "1.safetensors",
            }
        },
    )

    refused(
        tmp_path,
        str(tmp_path / INDEX),
        "3 disagreements",
        "tensor 'both' is in '2.safetensors', but the index says '1.safetensors'",
        "tensor 'moved' is in '1.safetensors', but the index says '2.safetensors'",
        "tensor 'extra' is in '1.safetensors', but not in the index",
    )


def test_the_list_of_disagreements_is_capped(tmp_path: Path) -> None:
    write_shard(tmp_path, "1.safetensors", "a", *(f"extra{i}" for i in range(1000)))
    write_index(tmp_path, {"weight_map": {"a": "1.safetensors"}})

    assert str(refused(tmp_path, "1000 disagreements", "and 980 more")).count("not in the index") == 20


def test_one_file_under_two_names(tmp_path: Path) -> None:
    write_shard(tmp_path, "1.safetensors", "a", "b")
    (tmp_path / "2.safetensors").symlink_to("1.safetensors")
    write_index(tmp_path, {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})

    refused(tmp_path, "but the index says")


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path, "1.safetensors", "a")
    (tmp_path / "2.safetensors").write_bytes(file_bytes(tensor(U8.replace("U8", "U9"), "b"), b"x"))
    write_index(tmp_path, {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})

    refused(tmp_path, str(tmp_path / "2.safetensors"), "tensor 'b', dtype", "'U9'")
