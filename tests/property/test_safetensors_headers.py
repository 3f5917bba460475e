"""Whatever the reference reader of safetensors refuses is refused here, and whatever it writes is read here."""

from __future__ import annotations

import json
import math
import re
import struct
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lading.errors import CorruptModelCheckpointError
from lading.formats.manifest import BITS
from lading.formats.safetensors import MAX_NAME_SIZE, header_length, parse_header
from tests.helpers.examples import examples

Tensors = dict[str, tuple[str, list[int], bytes]]

TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

names = st.one_of(st.sampled_from(["a", "b", "", "a.b"]), st.text(max_size=12)).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4)


def ours(raw: bytes) -> tuple[Tensors, dict[str, str]] | None:
    """What a file holds; ``None`` where it is refused."""
    try:
        length = header_length(raw[:8], file_size=len(raw), label="x")
        header = parse_header(raw[8 : 8 + length], buffer_size=len(raw) - 8 - length, label="x")
    except CorruptModelCheckpointError:
        return None

    tensors: Tensors = {}
    for name, dtype, shape, offset in zip(header.names, header.dtypes, header.shapes, header.offsets, strict=True):
        end = offset + math.prod(shape) * BITS[dtype] // 8
        tensors[name] = (dtype, list(shape), raw[offset:end])

    return tensors, dict(header.metadata)


def theirs(raw: bytes) -> Tensors | None:
    try:
        tensors = safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return None

    return {name: (value["dtype"], value["shape"], bytes(value["data"])) for name, value in tensors}


def check(raw: bytes) -> None:
    found = ours(raw)
    if found is not None:
        assert found[0] == theirs(raw)


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A valid header, its tensors and their fields in any order, and the size of the bytes behind it."""
    header: dict[str, Any] = {}
    at = 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(BITS))), draw(shapes)
        bits = math.prod(shape) * BITS[dtype]
        if bits % 8:
            dtype, bits = "U8", math.prod(shape) * 8
        fields = [("dtype", dtype), ("shape", shape), ("data_offsets", [at, at + bits // 8])]
        header[name] = dict(draw(st.permutations(fields)) if draw(st.booleans()) else fields)
        at += bits // 8
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))

    return {key: header[key] for key in draw(st.permutations(list(header)))}, at


@st.composite
def texts(draw: st.DrawFn) -> tuple[str, int]:
    header, size = draw(headers())
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), ("\t,\n", " :\r")]))
    text = json.dumps(header, separators=separators, ensure_ascii=draw(st.booleans()))

    return text + " " * draw(st.sampled_from([0, 0, 1, 7])), size


def pack(text: str | bytes, size: int) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data + bytes(i % 251 for i in range(size))


NUMBERS = st.one_of(
    st.integers(-2, 9),
    st.sampled_from([2**k + d for k in (31, 32, 53, 61, 63, 64) for d in (-1, 0, 1)]),
).map(str)
# What stands where a token of a header was: numbers, other values, punctuation, keys, whole members, odd white space.
ODD = st.one_of(
    NUMBERS,
    st.sampled_from(["-0", "0.0", "1e0", "1E400", "01", "NaN", "Infinity", "-Infinity", "true", "false", "null"]),
    st.sampled_from(["[]", "{}", "[0]", "[0,0]", "[0,0,0]", "[[0]]", '""', '"U8"', '"F4"', '"\\ud800"', '"\x00"']),
    st.sampled_from([*"{}[]:,", "\\", '"', "", " ", "\f", "\ufeff"]),
    st.sampled_from(['"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"a"', '"\\u0061"']),
    st.sampled_from(['"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', '"x":0,', '"__metadata__":{},']),
)
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[0-9]+|[{}\[\]:,]')


@settings(max_examples=examples(150), derandomize=True)
@given(texts())
def test_every_valid_header_is_read(text: tuple[str, int]) -> None:
    raw = pack(*text)
    found, reference = ours(raw), theirs(raw)

    assert reference is not None
    assert found is not None
    assert found[0] == reference


@settings(max_examples=examples(400), derandomize=True)
@given(texts(), st.data())
def test_with_other_tokens(text: tuple[str, int], data: st.DataObject) -> None:
    header, size = text
    for _ in range(data.draw(st.integers(1, 3))):
        tokens = list(TOKEN.finditer(header))
        if not tokens:
            break
        token = data.draw(st.sampled_from(tokens))
        start = data.draw(st.sampled_from([token.start(), token.start(), token.end()]))
        odd = data.draw(ODD | st.sampled_from(tokens).map(lambda t: t[0]))
        header = header[:start] + odd + header[token.end() :]

    check(pack(header, size + data.draw(st.sampled_from([0, 0, 0, -1, 1, 8])) if size else 0))


@settings(max_examples=examples(400), derandomize=True)
@given(texts(), st.data())
def test_with_other_bytes(text: tuple[str, int], data: st.DataObject) -> None:
    raw = bytearray(pack(*text))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        size = data.draw(st.sampled_from([0, 1, 1, 1, 2]))
        raw[at : at + size] = data.draw(
            st.binary(max_size=2) | st.sampled_from([b"0", b"1", b'"', b"{", b"]", b" ", b"\\"])
        )
    check(bytes(raw))

    # The same with the header's length put right, so that most changes are of the header alone.
    end = bytes(raw).rfind(b"}") + 1
    check(struct.pack("<Q", max(end - 8, 0)) + bytes(raw[8:]))


@pytest.mark.parametrize(
    "fields",
    [
        '"dtype":"U8","shape":[2,1],"data_offsets":[{},{}]',
        '"data_offsets":[{},{}],"dtype":"U8","shape":[2,1]',
        '"shape" : [ 2, 1 ], "dtype" : "U8", "data_offsets" : [ {} , {} ]',
    ],
)
def test_with_any_other_byte(fields: str) -> None:
    """Each byte of a header replaced, preceded by another one, and left out."""
    members = [f'"{"abc"[i]}":{{{fields.format(2 * i, 2 * i + 2)}}}' for i in range(3)]
    raw = pack("{" + ",".join(members) + "} ", 6)
    assert ours(raw) is not None
    end = raw.rfind(b"}") + 2

    for at in range(8, end):
        for byte in b'0159-+.eE \t\n\f\0"\\/{}[]:,abndtsU8_\x7f\x80\xc3\xff':
            check(raw[:at] + bytes([byte]) + raw[at + 1 :])
            longer = raw[8:at] + bytes([byte]) + raw[at:end]
            check(struct.pack("<Q", len(longer)) + longer + raw[end:])
        shorter = raw[8:at] + raw[at + 1 : end]
        check(struct.pack("<Q", len(shorter)) + shorter + raw[end:])


@settings(max_examples=examples(200), derandomize=True)
@given(
    st.lists(st.tuples(names, st.tuples(st.integers(0, 6), st.integers(0, 6)), shapes), max_size=4), st.integers(0, 8)
)
@example([("a", (0, 1), [1]), ("a", (0, 1), [1])], 1)
@example([("a", (0, 1), [1]), ("a", (1, 2), [1])], 2)
def test_with_any_offsets(entries: list[tuple[str, tuple[int, int], list[int]]], size: int) -> None:
    """Holes, overlaps and names that come twice, which the reference reader lets pass in part."""
    members = [
        f'{json.dumps(name)}:{{"dtype":"U8","shape":{shape},"data_offsets":{list(offsets)}}}'
        for name, offsets, shape in entries
    ]
    raw = pack("{" + ",".join(members) + "}", size)

    check(raw)
    if len({name for name, _, _ in entries}) != len(entries):
        assert ours(raw) is None


@settings(max_examples=examples(150), derandomize=True)
@given(
    st.dictionaries(
        st.text(max_size=MAX_NAME_SIZE // 4).filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(sorted(TORCH)), shapes),
        max_size=6,
    ),
    st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
)
def test_whatever_the_reference_writes_is_read(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None
) -> None:
    expected: Tensors = {}
    made = {}
    for i, (name, (dtype, shape)) in enumerate(tensors.items()):
        data = bytes([i + 1]) * (math.prod(shape) * BITS[dtype] // 8)
        expected[name] = (dtype, shape, data)
        flat = torch.frombuffer(bytearray(data), dtype=TORCH[dtype]) if data else torch.empty(0, dtype=TORCH[dtype])
        made[name] = flat.view(shape)

    # `None` for an empty map: with no tensors besides, the writer of version 0.8 makes a header that is no JSON.
    assert ours(save(made, metadata or None)) == (expected, metadata or {})
