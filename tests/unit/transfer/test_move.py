"""What a load says of the bytes that it reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lading.checkpoints.checkpoint import path_checkpoint
from lading.planning.box import Box
from lading.planning.composition import Stacked
from lading.planning.plan import Wanted, plan
from lading.transfer.memory import create_arena
from lading.transfer.move import PlannedLoad, load_tensors


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize(
    ("box", "parts"),
    [
        (Box.whole((2, 2, 3)), [0, 1]),
        (Box((1, 0, 0), (1, 2, 3)), [1]),
        (Box((0, 0, 0), (2, 2, 0)), []),
    ],
)
def test_each_tensor_of_a_composition_is_read_and_none_is_vouched_for(
    tmp_path: Path, box: Box, parts: list[int], hashed: bool
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"e{i}": torch.full((2, 3), float(i)) for i in range(3)}, path)
    checkpoint = path_checkpoint(path, cache=tmp_path)
    wanted = Wanted(
        tensors=[0, 2], boxes=[box, Box.whole((2, 3))], dtypes=["F32", "F32"], composed={0: Stacked((0, 1))}
    )
    planned = PlannedLoad(
        manifest=checkpoint.manifest,
        wanted=wanted,
        plan=plan(checkpoint.manifest, wanted),
        files=checkpoint.readable(),
        dims=[0, 0, 0] if hashed else None,
    )
    required: list[int] = []

    moved = load_tensors(
        planned,
        arena=create_arena(planned.plan.arena_bytes, torch.device("cpu"), "auto"),
        require=required.extend,
    )

    assert moved.wanted == [*parts, 2]
    assert moved.unvouched == required == (parts if hashed else [*parts, 2])
