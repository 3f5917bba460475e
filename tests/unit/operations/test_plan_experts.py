"""Plans of mixtures of experts: the bytes of each rank, from the names and shapes of a publisher."""

from __future__ import annotations

from typing import Any

import pytest

from lading.checkpoints.checkpoint import Checkpoint
from lading.errors import NotSupportedError
from lading.families.qwen3_moe import FAMILY, Qwen3MoEConfig
from lading.formats.manifest import Manifest
from lading.operations.plan import LoadPlan, plan_checkpoint
from tests.helpers.published_experts import manifest_of, separate_shapes

SMALL = Qwen3MoEConfig(
    model_dim=64, vocab_size=96, num_layers=3, num_attn_heads=8, num_key_value_heads=4, head_dim=8, num_experts=12,
    expert_inner_dim=24, ffn_inner_dim=48, dense_layers=[0],
)  # fmt: skip
LARGE = Qwen3MoEConfig(num_layers=118, num_experts=256)


def published(config: Qwen3MoEConfig) -> Manifest:
    return manifest_of({name: ("BF16", shape) for name, shape in separate_shapes(FAMILY, config)})


def planned(manifest: Manifest, config: Qwen3MoEConfig, **sizes: int) -> LoadPlan:
    checkpoint = Checkpoint(name="x", uri="file:///x", where="/x", manifest=manifest, files=None)
    every: dict[str, Any] = {"pp": 1, "rdp": 1, "sdp": 1, "ep": 1, "tp": 1} | sizes

    return plan_checkpoint(checkpoint, FAMILY, config, sizes=every, dtype=None, ranks=None)


def sizes_of(manifest: Manifest) -> tuple[int, int]:
    """The bytes of all experts, and of all other tensors."""
    experts = sum(manifest.nbytes(i) for i, name in enumerate(manifest.names) if ".experts." in name)

    return experts, manifest.total_bytes - experts


@pytest.mark.parametrize("sizes", [{"ep": 3}, {"ep": 12}, {"ep": 3, "rdp": 2}, {"ep": 4, "pp": 3}], ids=str)
def test_a_rank_reads_its_experts_alone(sizes: dict[str, int]) -> None:
    manifest = published(SMALL)
    experts, others = sizes_of(manifest)
    found = planned(manifest, SMALL, **sizes)

    assert [rank.ep for rank in found.ranks] == [*range(sizes["ep"])] * (len(found.ranks) // sizes["ep"])
    # Replicas read the same; the ranks of an expert gang share the experts, and each reads all others.
    copies = sizes["ep"] * sizes.get("rdp", 1)
    assert sum(rank.bytes_read for rank in found.ranks) == sizes.get("rdp", 1) * experts + copies * others
    for stage in {rank.pp for rank in found.ranks}:
        assert len({rank.bytes_read for rank in found.ranks if rank.pp == stage}) == 1


@pytest.mark.parametrize("sizes", [{"ep": 2, "sdp": 2}, {"ep": 4, "sdp": 3}, {"ep": 3, "sdp": 8}], ids=str)
def test_the_ranks_that_shard_parameters_share_the_experts_of_a_rank(sizes: dict[str, int]) -> None:
    manifest = published(SMALL)
    experts, others = sizes_of(manifest)
    found = planned(manifest, SMALL, **sizes)

    assert sum(rank.memory_bytes for rank in found.ranks) == experts + sizes["ep"] * others
    assert max(rank.memory_bytes for rank in found.ranks) < 1.5 * (experts / len(found.ranks) + others / sizes["sdp"])


def test_tensor_parallelism_splits_experts_too() -> None:
    manifest = published(SMALL)
    experts, others = sizes_of(manifest)

    for rank in planned(manifest, SMALL, ep=3, tp=2).ranks:
        assert experts // 6 < rank.memory_bytes < experts // 6 + 0.6 * others


def test_ranks_that_do_not_divide_the_experts() -> None:
    with pytest.raises(NotSupportedError, match="`num_experts` is 12, which 5"):
        planned(published(SMALL), SMALL, ep=5)


def test_a_model_of_ninety_thousand_tensors_over_64_ranks() -> None:
    manifest = published(LARGE)
    assert len(manifest) > 90_000
    experts, others = sizes_of(manifest)
    found = planned(manifest, LARGE, ep=64)

    assert [rank.bytes_read for rank in found.ranks] == [others + experts // 64] * 64
    assert [rank.memory_bytes for rank in found.ranks] == [others + experts // 64] * 64
