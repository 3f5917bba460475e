from __future__ import annotations

from array import array

import pytest

from lading.errors import InternalError
from lading.formats.manifest import Manifest, Piece, Shard


def make(**changes: object) -> Manifest:
    columns: dict[str, object] = {
        "format": "safetensors",
        "shards": (Shard(name="model.safetensors", size=1000),),
        "names": ["a", "b"],
        "dtypes": ["BF16", "F32"],
        "shapes": [(2, 3), ()],
        "shard_ids": array("I", [0, 0]),
        "offsets": array("q", [100, 112]),
    }
    return Manifest(**(columns | changes))  # type: ignore[arg-type]


def test_totals() -> None:
    manifest = make()
    assert len(manifest) == 2
    assert manifest.total_bytes == 16
    assert manifest.parameters == 7
    assert manifest.dtype_counts == {"BF16": 6, "F32": 1}


def test_one_tensor_as_a_row() -> None:
    row = make()[1]
    assert (row.name, row.dtype, row.shape, row.offset, row.nbytes) == ("b", "F32", (), 112, 4)
    assert [tensor.name for tensor in make()] == ["a", "b"]


def test_columns_of_different_lengths_are_a_mistake() -> None:
    with pytest.raises(InternalError, match="equal length"):
        make(names=["a"])


def test_a_shard_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(InternalError, match="shard 7"):
        make(shard_ids=array("I", [0, 7]))


# --- tensors in pieces -----------------------------------------------------------------------------------------------

UPPER, LOWER = Piece((0, 0), (1, 3), 0, 100), Piece((1, 0), (1, 3), 0, 500)


def test_a_tensor_in_pieces() -> None:
    manifest = make(pieces={0: (UPPER, LOWER)})
    assert manifest.total_bytes == 16
    assert manifest.tensors_equal(make(pieces={0: (UPPER, LOWER)}))
    assert not manifest.tensors_equal(make())
    assert manifest.take([1]).pieces == {}
    assert manifest.take([1, 0]).pieces == {1: (UPPER, LOWER)}


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ({2: (UPPER, LOWER)}, "pieces of tensor 2"),
        ({0: (UPPER, LOWER._replace(starts=(2, 0)))}, "does not lie in its shape"),
        ({0: (UPPER, LOWER._replace(starts=(1, -1)))}, "does not lie in its shape"),
        ({0: (UPPER, LOWER._replace(starts=(1,), shape=(1,)))}, "does not lie in its shape"),
        ({0: (UPPER, LOWER._replace(shard=1))}, "shard 1"),
        ({0: (UPPER,)}, "not all of its shape"),
        ({0: (UPPER, UPPER, LOWER)}, "not all of its shape"),
        ({0: (LOWER, UPPER)}, "beginning at"),
    ],
)
def test_pieces_that_make_no_tensor_are_a_mistake(pieces: dict[int, tuple[Piece, ...]], words: str) -> None:
    with pytest.raises(InternalError, match=words):
        make(pieces=pieces)
