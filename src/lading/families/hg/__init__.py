"""Any model of transformers 5, by its class there: ``pip install 'lading-hub[hf]'``.

transformers builds the module on the meta device, and lading reads the checkpoint, as for any other family. Code of a
repository never runs: ``auto_map`` in a ``config.json`` and ``trust_remote_code`` are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lading.families.hg.config import HuggingFaceModelConfig as HuggingFaceModelConfig
from lading.families.hg.config import complete, from_hf
from lading.families.hg.rules import rules_of
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.models.parallel_plan import ParallelPlan
from lading.planning.rules import Rule
from lading.system.deferred import deferred_call

if TYPE_CHECKING:
    from torch.nn import Module


def _rules_of_names(config: HuggingFaceModelConfig, names: Sequence[str]) -> Sequence[Rule]:
    from lading.families.hg.outline import outline

    return rules_of(outline(config), names)


def _parallel_plan(config: HuggingFaceModelConfig) -> ParallelPlan:
    from lading.families.hg.outline import outline
    from lading.families.hg.parallel import plan_of

    return plan_of(outline(config))


FAMILY: Family[Module, HuggingFaceModelConfig] = Family(
    name="hg",
    kls="torch.nn:Module",
    config_kls=HuggingFaceModelConfig,
    build=deferred_call("lading.families.hg.outline:build"),
    init=deferred_call("lading.families.hg.outline:init"),
    rules_of_names=_rules_of_names,
    may_lack=deferred_call("lading.families.hg.outline:may_lack"),
    transposed=deferred_call("lading.families.hg.outline:transposed"),
    parallel_plan=_parallel_plan,
    from_hf=from_hf,
    reads_other_model_types=True,
    complete=complete,
    untie=deferred_call("lading.families.hg.outline:untie"),
    dtypes=deferred_call("lading.families.hg.buffers:other_dtypes"),
    reset_buffers=deferred_call("lading.families.hg.buffers:reset_buffers"),
)

get_hg_model_hub: ModelHubAccessor[Module, HuggingFaceModelConfig] = ModelHubAccessor(
    "hg", FAMILY.kls, HuggingFaceModelConfig
)
