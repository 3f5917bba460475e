"""Mixtral (https://arxiv.org/abs/2401.04088)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lading.families.config_json import ConfigReader, ConfigTable, Entries, Field
from lading.families.decoder_family import decoder_family, plain_rope
from lading.families.mistral import CONFIG_JSON as MISTRAL_JSON
from lading.families.mistral import MistralConfig
from lading.families.name_rules import DECODER_RULES, expert_rules, meta_rules
from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.experts_spec import ExpertsSpec
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.planning.rules import Rule
from lading.system.deferred import deferred

if TYPE_CHECKING:
    from lading.families.nn.decoder_models import Mixtral as Mixtral
else:
    __getattr__ = deferred(globals(), Mixtral="lading.families.nn.decoder_models")


@dataclass(kw_only=True)
class MixtralConfig(MistralConfig):
    """The configuration of a Mixtral model; the defaults are those of the first one, with 8 experts of 7 billion.

    ``ffn_inner_dim`` is the inner width of an expert.
    """

    max_seq_len: int = 32_768
    rope_theta: float = 1_000_000.0
    attn_window_len: int | None = None

    num_experts: int = 8
    """The number of experts in a layer."""

    top_k: int = 2
    """The number of experts that process a token."""


def _spec(config: MixtralConfig) -> DecoderSpec:
    experts = ExpertsSpec(
        num_experts=config.num_experts, top_k=config.top_k, inner_dim=config.ffn_inner_dim, normalized=True
    )

    return DecoderSpec.of(config).with_experts(experts)


_ENTRIES: Entries = (
    plain_rope(1_000_000.0),
    Field("attn_window_len", "sliding_window", ConfigReader.maybe_count),
    Field("norm_eps", "rms_norm_eps", ConfigReader.number, 1e-5),
    Field("num_experts", "num_local_experts", ConfigReader.count, 8),
    Field("top_k", "num_experts_per_tok", ConfigReader.count, 2),
)
_KEYS = {key for entry in _ENTRIES for key in entry.keys}

CONFIG_JSON = ConfigTable(
    family="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    config_kls=MixtralConfig,
    spec=_spec,
    entries=(*(entry for entry in MISTRAL_JSON.entries if _KEYS.isdisjoint(entry.keys)), *_ENTRIES),
    constants=MISTRAL_JSON.constants,
    required=MISTRAL_JSON.required,
    ignored={
        **MISTRAL_JSON.ignored,
        "output_router_logits": "training",
        "router_aux_loss_coef": "training",
        "router_jitter_noise": "training",
    },
)
"""The keys of ``config.json``."""


def _expert_rules(prefix: str, module: str = "block_sparse_moe") -> Iterator[Rule]:
    return expert_rules(module, gate="w1", up="w3", down="w2", prefix=prefix)


def _rules(config: MixtralConfig) -> Sequence[Rule]:
    """Return the rules for the hub's names, and for Mistral AI's, whose rotary embeddings turn neighboring channels.

    Sources: https://github.com/mistralai/mistral-inference (``moe.py``, ``transformer_layers.py``) for the names with
    ``feed_forward``; transformers 4 (``models/mixtral/convert_mixtral_weights_to_hf.py``) for the first release, which
    has the weights of all experts below one another.
    """
    layer, target = "layers.{n}.block_sparse_moe", "model.layers.{n}.mlp.experts"

    return (
        *_expert_rules("model."),
        *_expert_rules(""),
        *_expert_rules("", "feed_forward"),
        Rule(f"{layer}.w1", f"{target}.gate_up_proj", concat=(1, 0), unfold=config.num_experts),
        Rule(f"{layer}.w3", f"{target}.gate_up_proj", concat=(1, 1), unfold=config.num_experts),
        Rule(f"{layer}.w2", f"{target}.down_proj", unfold=config.num_experts, transpose=True),
        *meta_rules(_spec(config).attn_head_dim),
        *DECODER_RULES,
    )


FAMILY: Family[Mixtral, MixtralConfig] = decoder_family(
    "lading.families.nn.decoder_models:Mixtral",
    _spec,
    CONFIG_JSON,
    rules=_rules,
    published=lambda config: tuple(_expert_rules("model.")),
)

get_mixtral_model_hub: ModelHubAccessor[Mixtral, MixtralConfig] = ModelHubAccessor("mixtral", FAMILY.kls, MixtralConfig)
