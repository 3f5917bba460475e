"""Experts over ranks: the outputs and gradients of one process, and the bytes of a rank's own experts."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lading.gangs import create_gangs
from lading.models.hub import load_model, load_with_report
from lading.operations.plan import plan_load
from tests.distributed.test_parity import differences
from tests.distributed.tiny_models import save_model
from tests.distributed.workers import Pool

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 96,
    "max_position_embeddings": 64, "num_experts_per_tok": 3,
}  # fmt: skip
EXPERTS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with separate experts, as transformers saves them, and one with stacked ones."""
    import transformers

    root = tmp_path_factory.mktemp("experts")
    mixtral = transformers.MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=EXPERTS)
    qwen = transformers.Qwen3MoeConfig(
        **SIZES, intermediate_size=24, moe_intermediate_size=16, num_experts=EXPERTS, mlp_only_layers=[0],
        norm_topk_prob=True, head_dim=8,
    )  # fmt: skip
    llama4 = transformers.Llama4TextConfig(
        **SIZES, intermediate_size=24, intermediate_size_mlp=40, num_local_experts=EXPERTS, head_dim=8,
        interleave_moe_layer_step=2, no_rope_layer_interval=2, attention_chunk_size=4, floor_scale=3,
    )  # fmt: skip
    made = {
        "llama4": save_model(root / "llama4", transformers.Llama4ForCausalLM, llama4),
        "mixtral": save_model(root / "mixtral", transformers.MixtralForCausalLM, mixtral),
        "qwen3_moe": save_model(root / "qwen3_moe", transformers.Qwen3MoeForCausalLM, qwen),
        "stacked": root / "stacked",
    }
    save_model(made["stacked"], transformers.Qwen3MoeForCausalLM, qwen, save_original_format=False)

    return made


def load_and_compare(folder: Path, sizes: dict[str, int]) -> list[str]:
    torch.set_num_threads(1)
    with warnings.catch_warnings(), create_gangs("cpu", **sizes) as gangs:
        warnings.simplefilter("error")
        alone = load_model(folder, device="cpu", dtype=torch.float32, progress=False).eval()
        model, report = load_with_report(folder, gangs=gangs, dtype=torch.float32, progress=False)
        (planned,) = plan_load(folder, dtype="float32", ranks=(gangs.root.rank,), **sizes, rdp=gangs.rdp.size).ranks

        found = [] if report.bytes_read == planned.bytes_read else [f"{report.bytes_read} bytes, not {planned}"]
        return found + differences(model.eval(), alone)


def case_id(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(f"{axis}{size}" for axis, size in value.items())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mixtral", {"ep": 4}),
        ("llama4", {"ep": 2, "tp": 2}),
        ("mixtral", {"ep": 2, "tp": 2}),
        ("qwen3_moe", {"ep": 2, "sdp": 2}),
        ("stacked", {"tp": 2, "sdp": 2}),
        *(
            pytest.param(name, sizes, marks=pytest.mark.slow)
            for name in ("llama4", "mixtral", "qwen3_moe", "stacked")
            for sizes in ({"tp": 4}, {"sdp": 4}, {"ep": 2}, {"ep": 2, "tp": 2}, {"ep": 2, "sdp": 2})
        ),
    ],
    ids=case_id,
)
def test_four_ranks(pool4: Pool, folders: dict[str, Path], name: str, sizes: dict[str, int]) -> None:
    assert pool4.values(load_and_compare, folders[name], sizes) == [[]] * 4


@pytest.fixture(scope="module")
def pool8() -> Any:
    with Pool(8) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        dict(zip(("ep", "tp", "sdp"), sizes, strict=True))
        for sizes in itertools.product([1, 2, 4, 8], repeat=3)
        if math.prod(sizes) in (4, 8)
    ],
    ids=case_id,
)
@pytest.mark.parametrize("name", ["llama4", "mixtral", "qwen3_moe", "stacked"])
def test_eight_ranks(pool8: Pool, folders: dict[str, Path], name: str, sizes: dict[str, int]) -> None:
    assert pool8.values(load_and_compare, folders[name], sizes) == [[]] * 8
