"""Files are mapped ahead where that costs no disk, and what is not wanted is not made present."""

from __future__ import annotations

import os
import random
from array import array
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lading.errors import CorruptModelCheckpointError
from lading.formats.manifest import Manifest, Shard
from lading.planning.box import Box
from lading.planning.plan import PAGE, Wanted, plan
from lading.system.filesystem import FileStat
from lading.transfer.execute import execute
from lading.transfer.files import ShardFile
from lading.transfer.mappings import CELL, NOTHING_AHEAD, Ahead, Range, cells_of, mapped_ahead, may_be_mapped
from lading.transfer.pages import BLOCK

ROWS = 32  # of a MiB each

ranges = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 3 * CELL), st.integers(1, 2 * CELL)).map(
        lambda r: (r[0], r[1], r[1] + r[2])
    ),
    max_size=8,
)


@given(ranges)
def test_cells_hold_all_ranges_and_little_else(wanted: list[Range]) -> None:
    cells = cells_of(wanted)

    for (_, number), parts in cells.items():
        assert all(begin % PAGE == 0 for begin, _ in parts)
        assert number * CELL <= parts[0][0]
        assert parts[-1][1] <= (number + 1) * CELL
        assert all(begin < end for begin, end in parts)
        assert all(after - before >= BLOCK for (_, before), (after, _) in pairwise(parts))

    for shard, begin, end in wanted:
        at = begin
        while at < end:
            parts = cells[shard, at // CELL]
            at = next(last for first, last in parts if first <= at < last)

    whole = sum(end - begin for parts in cells.values() for begin, end in parts)
    gaps = sum(len(parts) for parts in cells.values()) + len(wanted)
    assert whole <= sum(end - begin for _, begin, end in wanted) + gaps * (BLOCK + PAGE)


def checkpoint(path: Path, seed: int = 0) -> tuple[Manifest, list[ShardFile], torch.Tensor]:
    path.write_bytes(random.Random(seed).randbytes(ROWS << 20))
    tensor = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.bfloat16).view(ROWS, -1)
    manifest = Manifest(
        format="safetensors",
        shards=(Shard(name=path.name, size=tensor.nbytes),),
        names=["w"],
        dtypes=["BF16"],
        shapes=[tuple(tensor.shape)],
        shard_ids=array("I", [0]),
        offsets=array("q", [0]),
    )
    return manifest, [ShardFile(path=path, stat=FileStat.from_stat(path.stat()))], tensor


def present(path: Path) -> int:
    """Bytes of a file that are present in this process."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return sum(
        next(int(field.split()[1]) << 10 for field in lines if field.startswith("Rss:"))
        for line in lines
        if line.endswith(str(path))
    )


def evict(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def mapped(
    manifest: Manifest, files: list[ShardFile], ahead: Ahead, box: Box | None = None, dtype: str = "BF16"
) -> torch.Tensor:
    box = box or Box.whole(manifest.shapes[0])
    planned = plan(manifest, Wanted(tensors=[0], boxes=[box], dtypes=[dtype]), mapped=True)
    (loaded,) = execute(planned, files, [(box.sizes, dtype)], ahead=ahead)
    return loaded


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_what_is_in_the_page_cache_is_present_before_it_is_asked_for(tmp_path: Path, dtype: str | None) -> None:
    manifest, files, tensor = checkpoint(tmp_path / "x")

    with mapped_ahead(files, may_be_mapped(manifest, dtype)) as ahead:
        assert set(ahead.mappings) == {0}
    assert present(tmp_path / "x") == tensor.nbytes

    loaded = mapped(manifest, files, ahead)
    assert torch.equal(loaded.view(torch.int16), tensor.view(torch.int16))
    assert present(tmp_path / "x") == tensor.nbytes, "it was mapped once more"


def test_what_needs_a_cast_is_not_mapped(tmp_path: Path) -> None:
    manifest, files, tensor = checkpoint(tmp_path / "x")

    with mapped_ahead(files, may_be_mapped(manifest, "F32")) as ahead:
        assert not ahead.mappings
    assert mapped(manifest, files, ahead, dtype="F32").nan_to_num().equal(tensor.float().nan_to_num())


def test_nothing_is_read_from_the_disk_ahead(tmp_path: Path) -> None:
    manifest, files, tensor = checkpoint(tmp_path / "x")
    evict(tmp_path / "x")

    with mapped_ahead(files, may_be_mapped(manifest, None)) as ahead:
        assert not ahead.mappings
    loaded = mapped(manifest, files, ahead)
    assert torch.equal(loaded.view(torch.int16), tensor.view(torch.int16))


def test_a_load_reports_a_file_that_changed(tmp_path: Path) -> None:
    manifest, files, _ = checkpoint(tmp_path / "x")
    checkpoint(tmp_path / "x", seed=1)

    with mapped_ahead(files, may_be_mapped(manifest, None)) as ahead:
        assert not ahead.mappings
    with pytest.raises(CorruptModelCheckpointError, match="changed while it was loaded"):
        mapped(manifest, files, ahead)

    (tmp_path / "x").unlink()
    with mapped_ahead(files, may_be_mapped(manifest, None)) as ahead:
        assert not ahead.mappings
    with pytest.raises(FileNotFoundError):
        mapped(manifest, files, ahead)


def test_a_load_reports_a_file_that_is_replaced_after_it_was_mapped(tmp_path: Path) -> None:
    manifest, files, _ = checkpoint(tmp_path / "x")

    with mapped_ahead(files, may_be_mapped(manifest, None)) as ahead:
        checkpoint(tmp_path / "y", seed=1)
        (tmp_path / "y").replace(tmp_path / "x")
        with pytest.raises(CorruptModelCheckpointError, match="changed while it was loaded"):
            mapped(manifest, files, ahead)


def test_an_error_in_the_block_passes(tmp_path: Path) -> None:
    manifest, files, _ = checkpoint(tmp_path / "x")

    with (
        pytest.raises(KeyboardInterrupt),
        mapped_ahead(files, may_be_mapped(manifest, None)),
    ):
        raise KeyboardInterrupt


def test_a_part_of_a_mapping_is_all_that_is_made_present(tmp_path: Path) -> None:
    manifest, files, tensor = checkpoint(tmp_path / "x")
    box = Box((ROWS // 4, 0), (ROWS // 4, tensor.shape[1]))

    loaded = mapped(manifest, files, NOTHING_AHEAD, box)
    assert tensor.nbytes // 4 <= present(tmp_path / "x") <= tensor.nbytes // 2
    assert torch.equal(loaded.view(torch.int16), tensor[ROWS // 4 : ROWS // 2].view(torch.int16))
