"""Any model of transformers 5, by its class there: ``pip install 'lading-hub[hf]'``.

transformers builds the module on the meta device, and lading reads the checkpoint, as for any other family. Code of a
repository never runs: ``auto_map`` in a ``config.json`` and ``trust_remote_code`` are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lading.families.hg.config import HuggingFaceModelConfig as HuggingFaceModelConfig
from lading.families.hg.config import complete, from_hf
from lading.families.hg.rules import rules_of
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.models.parallel_plan import ParallelPlan
from lading.planning.rules import Rule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module


def _build(config: HuggingFaceModelConfig) -> Module:
    from lading.families.hg.outline import build

    return build(config)


def _init(model: Module, config: HuggingFaceModelConfig, name: str, tensor: Tensor) -> None:
    from lading.families.hg.outline import init

    init(model, config, name, tensor)


def _rules_of_names(config: HuggingFaceModelConfig, names: Sequence[str]) -> Sequence[Rule]:
    from lading.families.hg.outline import outline

    return rules_of(outline(config), names)


def _transposed(config: HuggingFaceModelConfig) -> frozenset[str]:
    from lading.families.hg.outline import transposed

    return transposed(config)


def _may_lack(config: HuggingFaceModelConfig, names: Sequence[str]) -> Sequence[str]:
    from lading.families.hg.outline import may_lack

    return may_lack(config, names)


def _parallel_plan(config: HuggingFaceModelConfig) -> ParallelPlan:
    from lading.families.hg.outline import outline
    from lading.families.hg.parallel import plan_of

    return plan_of(outline(config))


def _untie(model: Module, names: Sequence[str]) -> None:
    from lading.families.hg.outline import untie

    untie(model, names)


def _dtypes(model: Module, config: HuggingFaceModelConfig, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
    from lading.families.hg.buffers import other_dtypes
    from lading.families.hg.outline import outline

    return other_dtypes(model, dtype, outline(config))


def _reset_buffers(model: Module, config: HuggingFaceModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    from lading.families.hg.buffers import reset_buffers
    from lading.families.hg.outline import outline

    reset_buffers(model, device, dtype, lambda: outline(config))


FAMILY: Family[Module, HuggingFaceModelConfig] = Family(
    name="hg",
    kls="torch.nn:Module",
    config_kls=HuggingFaceModelConfig,
    build=_build,
    init=_init,
    rules_of_names=_rules_of_names,
    may_lack=_may_lack,
    transposed=_transposed,
    parallel_plan=_parallel_plan,
    from_hf=from_hf,
    reads_other_model_types=True,
    complete=complete,
    untie=_untie,
    dtypes=_dtypes,
    reset_buffers=_reset_buffers,
)

get_hg_model_hub: ModelHubAccessor[Module, HuggingFaceModelConfig] = ModelHubAccessor(
    "hg", FAMILY.kls, HuggingFaceModelConfig
)
