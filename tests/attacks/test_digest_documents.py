"""One test for each lie that a document of digests can tell."""

from __future__ import annotations

import copy
import json
import tracemalloc
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from lading.errors import CorruptModelCheckpointError
from lading.formats.digest_document import dump_digests, most_bytes, parse_digests
from lading.formats.digests import Digests, recorded
from lading.formats.manifest import Manifest, Shard

SHA256 = "ab" * 32
MANIFEST = Manifest(
    format="safetensors",
    shards=(Shard(name="a.safetensors", size=4096, sha256=SHA256), Shard(name="b.safetensors", size=100)),
    names=("matrix", 'odd " \n é \x01 name', "scalar", "empty", "bits"),
    dtypes=("BF16", "F32", "U8", "F64", "F4"),
    shapes=((16, 3), (5,), (), (0, 4), (2, 3)),
    shard_ids=array("I", [0, 0, 1, 1, 1]),
    offsets=array("q", [100, 200, 10, 11, 11]),
)
DIGESTS = recorded(MANIFEST, [(0, bytes(range(256))), (0, b"b" * 32), (0, b"c" * 32), (1, b"d" * 32), (0, b"e" * 32)])
TEXT = "".join(dump_digests(MANIFEST, DIGESTS))
TREE: dict[str, Any] = json.loads(TEXT)
ODD = MANIFEST.names[1]

Lie = Callable[[dict[str, Any]], object]


def parse(text: str | bytes) -> Digests:
    return parse_digests(text if isinstance(text, bytes) else text.encode(), MANIFEST, label="/d.json")


def refused(text: str | bytes, *parts: str) -> None:
    with pytest.raises(CorruptModelCheckpointError) as caught:
        parse(text)
    message = str(caught.value)
    assert message.startswith("/d.json: ")
    for part in ("expected", "found", "`lading digests NAME --write FILE`", *parts):
        assert part in message
    assert len(message) < 1000
    assert message.isprintable()


def test_a_document_comes_back() -> None:
    assert parse(TEXT) == DIGESTS
    assert len(TEXT) <= most_bytes(MANIFEST)


@pytest.mark.parametrize("options", [{}, {"indent": 4}, {"sort_keys": True}, {"separators": (",", ":")}])
def test_another_layout_means_the_same(options: dict[str, Any]) -> None:
    text = json.dumps(TREE, **options)
    assert parse(text) == DIGESTS
    assert len(text) <= most_bytes(MANIFEST)


def test_no_files_are_those_of_a_rewrite() -> None:
    assert parse("".join(dump_digests(MANIFEST, DIGESTS, shards=False))) == DIGESTS


def test_a_digest_that_is_not_known_on_one_side() -> None:
    tree = copy.deepcopy(TREE)
    del tree["shards"]["a.safetensors"]["sha256"]
    tree["shards"]["b.safetensors"]["sha256"] = SHA256
    assert parse(json.dumps(tree)) == DIGESTS


def test_one_file_may_have_another_name() -> None:
    one = MANIFEST.only(0)
    data = "".join(dump_digests(one, recorded(one, [(0, bytes(256)), (0, bytes(32))])))
    parse_digests(data.replace("a.safetensors", "model.safetensors").encode(), one, label="d")


def put(*path: str, value: object) -> Lie:
    def lie(tree: dict[str, Any]) -> None:
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value

    return lie


def drop(*path: str) -> Lie:
    def lie(tree: dict[str, Any]) -> None:
        for key in path[:-1]:
            tree = tree[key]
        del tree[path[-1]]

    return lie


M, A = ("tensors", "matrix"), ("shards", "a.safetensors")
BLOCKS = TREE["tensors"]["matrix"]["blocks"]

# name: what is changed, what the message must say
LIES: dict[str, tuple[Lie, tuple[str, ...]]] = {
    "no format": (drop("format"), ("the keys format, shards and tensors", "found shards, tensors")),
    "no shards": (drop("shards"), ("the keys format, shards and tensors",)),
    "no tensors": (drop("tensors"), ("the keys format, shards and tensors",)),
    "another key": (put("x", value=1), ("only", "'x'")),
    "a later format": (put("format", value="lading digests 2"), ("'lading digests 1'", "'lading digests 2'")),
    "a format that is a number": (put("format", value=1), ("format", "a string")),
    # files
    "shards as a list": (put("shards", value=[]), ("shards", "'{'", "'['")),
    "one file too few": (drop("shards", "b.safetensors"), ("the 2 files", "1 files")),
    "one file too many": (put("shards", "c.safetensors", value={"size": 1}), ("the 2 files", "'c.safetensors'")),
    "a file of another size": (put(*A, "size", value=4097), ("'a.safetensors', size", "4096", "4097")),
    "a file of a negative size": (put(*A, "size", value=-1), ("an integer from 0", "'-1'")),
    "a file of a huge size": (put(*A, "size", value=2**63), ("an integer from 0", str(2**63))),
    "a size as a float": (put(*A, "size", value=4096.0), ("an integer", "4096.0")),
    "a size as text": (put(*A, "size", value="4096"), ("an integer", '"4096"')),
    "a size as null": (put(*A, "size", value=None), ("an integer", "null")),
    "no size": (drop(*A, "size"), ("size", "4096", "none")),
    "a file of another SHA-256": (put(*A, "sha256", value="0" * 64), (SHA256, "0" * 64)),
    "a SHA-256 that is short": (put(*A, "sha256", value="ab"), ("64 lower-case", "'ab'")),
    "a SHA-256 in capitals": (put(*A, "sha256", value=SHA256.upper()), ("64 lower-case",)),
    "a SHA-256 as null": (put(*A, "sha256", value=None), ("a string", "null")),
    "another field of a file": (put(*A, "x", value=1), ("size and sha256 only", "'x'")),
    # tensors
    "tensors as null": (put("tensors", value=None), ("tensors", "'{'", "null")),
    "no tensor at all": (put("tensors", value={}), ("all 5 tensors", "0, without 'matrix'")),
    "a tensor too few": (drop("tensors", ODD), ("all 5 tensors", "4, without")),
    "a tensor too many": (put("tensors", "more", value=TREE["tensors"]["matrix"]), ("only names", "'more'")),
    "a tensor as null": (put(*M, value=None), ("tensor 'matrix'", "'{'")),
    "another dtype": (put(*M, "dtype", value="F16"), ("tensor 'matrix', dtype", "'BF16'", "'F16'")),
    "another shape": (put(*M, "shape", value=[3, 16]), ("tensor 'matrix', shape", "[16, 3]", "[3, 16]")),
    "a shape of more dims": (put(*M, "shape", value=[16, 3, 1]), ("shape", "[16, 3, 1]")),
    "a shape of very many dims": (put(*M, "shape", value=[1] * 65), ("shape", "at most 64")),
    "a size below zero": (put(*M, "shape", value=[-16, 3]), ("shape", "integers")),
    "a dim that it does not have": (put(*M, "dim", value=2), ("tensor 'matrix', dim", "[16, 3]", "2")),
    "a dim that is beyond a byte": (put(*M, "dim", value=300), ("dim", "300")),
    "a negative dim": (put(*M, "dim", value=-1), ("an integer from 0", "'-1'")),
    "a dim that is true": (put(*M, "dim", value=True), ("an integer", "true")),
    "a dim of a scalar": (put("tensors", "scalar", "dim", value=1), ("'scalar', dim", "[]")),
    "the dim of other blocks": (put(*M, "dim", value=1), ("64 digits, for 1 blocks along dim 1", "512 digits")),
    "no blocks": (put(*M, "blocks", value=""), ("512 digits, for 8 blocks", "found 0 digits")),
    "a block too few": (put(*M, "blocks", value=BLOCKS[64:]), ("512 digits", "448 digits")),
    "a block too many": (put(*M, "blocks", value=BLOCKS + BLOCKS[:64]), ("512 digits", "576 digits")),
    "half a digit": (put(*M, "blocks", value=BLOCKS[1:]), ("512 digits", "511 digits")),
    "digits in capitals": (put(*M, "blocks", value=BLOCKS.upper()), ("lower-case",)),
    "what is no digit": (put(*M, "blocks", value="g" * 512), ("hexadecimal",)),
    "digits of other scripts": (put(*M, "blocks", value="\u0661" * 512), ("hexadecimal",)),
    "blocks as a list": (put(*M, "blocks", value=[BLOCKS]), ("a string", "'['")),
    "another field of a tensor": (put(*M, "offset", value=1), ("dtype, shape, dim and blocks only", "'offset'")),
    **{
        f"a tensor without {key}": (drop(*M, key), ("dtype, shape, dim and blocks", "tensor 'matrix'"))
        for key in ("dtype", "shape", "dim", "blocks")
    },
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie(name: str) -> None:
    lie, parts = LIES[name]
    tree = copy.deepcopy(TREE)
    lie(tree)
    refused(json.dumps(tree), *parts)
    refused(json.dumps(tree, ensure_ascii=False, indent=1), *parts)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "'{'"),
        ("[]", "'{'"),
        ("null", "'{'"),
        (TEXT[:-3], "','"),
        (TEXT[: len(TEXT) // 2], "a string"),
        (TEXT + "{}", "the end of the text"),
        (TEXT + "x", "the end of the text"),
        ("\ufeff" + TEXT, "'{'"),
        (TEXT.encode("utf-16"), "UTF-8"),
        (TEXT.replace('"matrix"', '"matri\\u0078": {}, "matrix"'), "dtype, shape, dim and blocks"),
        (TEXT.replace('"scalar"', '"matri\\u0078"'), "'matrix' twice"),
        (TEXT.replace('"scalar"', '"matrix"'), "'matrix' twice"),
        (TEXT.replace('"b.safetensors"', '"a.safetensors"'), "'a.safetensors' twice"),
        (TEXT.replace('"dim"', '"dim": 0, "dim"', 1), "'dim' twice"),
        (TEXT.replace('"dim": 0', '"dim": NaN', 1), "an integer"),
        (TEXT.replace('"dim": 0', '"dim": 1e0', 1), "an integer"),
        (TEXT.replace('"dim": 0', '"dim": 00', 1), "an integer"),
        (TEXT.replace('"dim": 0', f'"dim": {"9" * 10_000}', 1), "an integer"),
        (TEXT.replace('"matrix"', '"\\ud800"'), "surrogate"),
        ('{"tensors": ' + '{"matrix": ' * 100_000, "dtype, shape, dim and blocks only"),
        ('{"x": ' + "[" * 100_000, "only"),
    ],
)
def test_text_that_is_no_document(text: str | bytes, part: str) -> None:
    refused(text, part)


def test_a_large_lie_is_not_built() -> None:
    data = ('{"tensors": {"matrix": {"blocks": [' + "[],[]," * 3_000_000).encode()
    tracemalloc.start()
    refused(data, "a string")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(data)
