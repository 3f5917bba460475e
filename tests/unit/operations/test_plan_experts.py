"""Plans of mixtures of experts: the bytes of each rank, from the names and shapes of a publisher."""

from __future__ import annotations

import re

import pytest
import torch

from lading.checkpoints.checkpoint import Checkpoint
from lading.errors import NotSupportedError
from lading.families import deepseek
from lading.families.qwen3_moe import FAMILY, Qwen3MoEConfig
from lading.formats.manifest import Manifest
from lading.gangs.world import AXES
from lading.operations.plan import LoadPlan, plan_checkpoint
from tests.helpers.deepseek_manifest import deepseek_manifest
from tests.helpers.published_experts import manifest_of, separate_shapes

SMALL = Qwen3MoEConfig(
    model_dim=64, vocab_size=96, num_layers=3, num_attn_heads=8, num_key_value_heads=4, head_dim=8, num_experts=12,
    expert_inner_dim=24, ffn_inner_dim=48, dense_layers=[0],
)  # fmt: skip


def published(config: Qwen3MoEConfig) -> Manifest:
    return manifest_of({name: ("BF16", shape) for name, shape in separate_shapes(FAMILY, config)})


def planned(manifest: Manifest, config: Qwen3MoEConfig, **sizes: int) -> LoadPlan:
    checkpoint = Checkpoint(name="x", uri="file:///x", where="/x", manifest=manifest, files=None)

    return plan_checkpoint(checkpoint, FAMILY, config, sizes=dict.fromkeys(AXES, 1) | sizes, dtype=None, ranks=None)


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


def test_deepseek_v3_over_64_ranks() -> None:
    manifest = deepseek_manifest()
    assert len(manifest) == 91_991
    checkpoint = Checkpoint(name="x", uri="file:///x", where="/x", manifest=manifest, files=None)
    sizes = dict.fromkeys(AXES, 1) | {"ep": 64}
    found = plan_checkpoint(
        checkpoint, deepseek.FAMILY, deepseek.DeepSeekConfig(), sizes=sizes, dtype=torch.bfloat16, ranks=None
    )

    shared = 0
    own = [0] * 64
    for i, name in enumerate(manifest.names):
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if name.startswith("model.layers.61."):  # drafts further tokens
            continue
        if expert is None:
            shared += manifest.nbytes(i)
        else:
            own[int(expert[1]) // 4] += manifest.nbytes(i)
    assert [rank.bytes_read for rank in found.ranks] == [shared + part for part in own]
    # A bias of each router is in float32.
    experts = 58 * 256 * 3 * 7168 * 2048
    others = 671_026_419_200 - experts
    assert {rank.memory_bytes for rank in found.ranks} == {2 * (others + experts // 64) + 2 * 58 * 256}
