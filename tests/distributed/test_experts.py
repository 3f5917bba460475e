"""Experts over ranks: the outputs and gradients of one process, and the bytes of a rank's own experts."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lading.catalog.store import get_asset_store
from lading.gangs import create_fake_gangs, create_gangs
from lading.models.construct import create_model
from lading.models.hf_config import family_of_folder
from lading.models.hub import ModelHub, load_model, load_with_report
from lading.models.targets import is_distributed
from lading.operations.export import export_model
from lading.operations.plan import plan_load
from tests.distributed.test_cooperative import both_ways
from tests.distributed.test_parity import differences
from tests.distributed.tiny_models import save_model
from tests.distributed.workers import Pool
from tests.helpers.block_scaled import quantize_folder

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 96,
    "max_position_embeddings": 64, "num_experts_per_tok": 3,
}  # fmt: skip
EXPERTS = 8

SCALED: dict[str, Any] = {
    **SIZES, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 144, "intermediate_size": 264,
    "moe_intermediate_size": 136, "q_lora_rank": 40, "kv_lora_rank": 24, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16,
    "v_head_dim": 38, "n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
}  # fmt: skip
"""Sizes whose parts end inside a block of 128."""


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
    deepseek = transformers.DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 8}, intermediate_size=24, moe_intermediate_size=16, n_routed_experts=EXPERTS,
        n_group=4, topk_group=2, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=12, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
    )  # fmt: skip
    made = {
        "deepseek": save_model(root / "deepseek", transformers.DeepseekV3ForCausalLM, deepseek),
        "llama4": save_model(root / "llama4", transformers.Llama4ForCausalLM, llama4),
        "mixtral": save_model(root / "mixtral", transformers.MixtralForCausalLM, mixtral),
        "qwen3_moe": save_model(root / "qwen3_moe", transformers.Qwen3MoeForCausalLM, qwen),
        "stacked": root / "stacked",
    }
    save_model(made["stacked"], transformers.Qwen3MoeForCausalLM, qwen, save_original_format=False)
    scaled = transformers.DeepseekV3Config(**SCALED)
    made["deepseek-scaled"] = save_model(root / "scaled", transformers.DeepseekV3ForCausalLM, scaled)
    quantize_folder(made["deepseek-scaled"])

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


QUICK: list[tuple[str, dict[str, int]]] = [
    ("qwen3_moe", {"ep": 4}),
    ("llama4", {"ep": 2, "tp": 2}),
    ("mixtral", {"ep": 2, "tp": 2}),
    ("deepseek", {"ep": 2, "sdp": 2}),
    ("stacked", {"tp": 2, "sdp": 2}),
    ("deepseek-scaled", {"tp": 4}),
]
ALL = [
    (name, sizes)
    for name in ("deepseek", "llama4", "mixtral", "qwen3_moe", "stacked")
    for sizes in ({"tp": 4}, {"ep": 4}, {"sdp": 4}, {"ep": 2}, {"ep": 2, "tp": 2}, {"ep": 2, "sdp": 2})
]


def case_id(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(f"{axis}{size}" for axis, size in value.items())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *QUICK,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK),
    ],
    ids=case_id,
)
def test_four_ranks(pool4: Pool, folders: dict[str, Path], name: str, sizes: dict[str, int]) -> None:
    assert pool4.values(load_and_compare, folders[name], sizes) == [[]] * 4


def new_and_exported(folder: Path, sizes: dict[str, int], place: str) -> list[str]:
    torch.set_num_threads(1)
    family, config = family_of_folder(folder)
    torch.manual_seed(7)
    alone = create_model(family, config, gangs=create_fake_gangs("cpu"), dtype=torch.float32, meta=False)
    torch.manual_seed(7)
    with create_gangs("cpu", **sizes) as gangs:
        model = create_model(family, config, gangs=gangs, dtype=torch.float32, meta=False)
        export_model(model, family, config, place, gangs=gangs, shard_size=10_000)
        state = load_model(Path(place), device="cpu", dtype=torch.float32, progress=False).state_dict()
        expected = alone.state_dict()
        parts = dict(ModelHub(family, get_asset_store()).iter_checkpoint(Path(place), config, gangs=gangs))
        own = {name: p.to_local() if is_distributed(p) else p for name, p in model.named_parameters()}

        found = [f"exported {name}" for name in expected if not torch.equal(state[name], expected[name])]
        return found + [f"part {name}" for name, part in own.items() if not torch.equal(parts[name], part.detach())]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen3_moe", {"ep": 2, "pp": 2}),
        pytest.param("qwen3_moe", {"ep": 2, "sdp": 2}, marks=pytest.mark.slow),
        pytest.param("mixtral", {"ep": 2, "tp": 2}, marks=pytest.mark.slow),
    ],
    ids=case_id,
)
def test_a_new_model_its_export_and_its_parts(
    pool4: Pool, folders: dict[str, Path], tmp_path: Path, name: str, sizes: dict[str, int]
) -> None:
    assert pool4.values(new_and_exported, folders[name], sizes, str(tmp_path / "out")) == [[]] * 4


def test_scaled_weights_that_ranks_read_together(pool4: Pool, folders: dict[str, Path]) -> None:
    for different, _, _ in pool4.values(both_ways, folders["deepseek-scaled"], {"tp": 2, "sdp": 2}, "bf16"):
        assert different == []


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
