"""LLaMA 1 (https://arxiv.org/abs/2302.13971), 2 (https://arxiv.org/abs/2307.09288) and 3
(https://arxiv.org/abs/2407.21783).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lading.families.config_json import ConfigReader, ConfigTable, Field, KeyGroup
from lading.families.decoder_family import (
    CHANGES_EACH_DECODER,
    NO_TOKENS,
    NO_WINDOWS,
    ROPE_KEYS,
    SILU,
    DecoderConfig,
    decoder_family,
    read_rope,
)
from lading.families.name_rules import rules_of_adjacent_channels
from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.rope_scaling import LLaMA3Scaling
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.system.deferred import deferred

if TYPE_CHECKING:
    from lading.families.nn.decoder_models import LLaMA as LLaMA
else:
    __getattr__ = deferred(globals(), LLaMA="lading.families.nn.decoder_models")


@dataclass
class LLaMARoPEScaleConfig:
    """The scaling of rotary frequencies in LLaMA 3.1."""

    factor: float = 8.0
    """The context to reach, divided by the context of the first training."""

    frequency_factors: tuple[float, float] = (1.0, 4.0)
    """The context of the first training, divided by the longest and by the shortest interpolated wavelength."""

    original_context_length: int = 8192
    """The context of the first training, in tokens."""


@dataclass(kw_only=True)
class LLaMAConfig(DecoderConfig):
    """The configuration of a LLaMA model; the defaults are those of the first one with 7 billion parameters."""

    model_dim: int = 4096
    max_seq_len: int = 2048
    vocab_size: int = 32_000
    num_layers: int = 32
    num_attn_heads: int = 32
    num_key_value_heads: int = 32
    rope_theta: float = 10_000.0

    pad_idx: int | None = None
    """The index of the symbol for padding."""

    head_dim: int | None = None
    """The width of an attention head; ``None`` means ``model_dim // num_attn_heads``."""

    qkv_proj_bias: bool = False
    """True if the projections of queries, keys and values have a bias."""

    output_proj_bias: bool = False
    """True if the output projection of attention has a bias."""

    ffn_inner_dim: int = 4096 * 4
    """The inner width of the feed-forward networks before the next three fields apply; see :meth:`gated_inner_dim`."""

    ffn_inner_dim_scale: float = 2 / 3
    """The factor that narrows a gated network, which has three projections instead of two."""

    ffn_inner_dim_multiplier: float = 1.0
    """Another factor of the inner width."""

    ffn_inner_dim_multiple_of: int = 256
    """The inner width is rounded up to a multiple of this number."""

    ffn_bias: bool = False
    """True if the projections of the feed-forward networks have a bias."""

    norm_eps: float = 1e-5
    """The number that is added to the mean square before taking its root."""

    use_scaled_rope: bool = False
    """True if these frequencies are scaled by ``rope_scale``."""

    rope_scale: LLaMARoPEScaleConfig = field(default_factory=LLaMARoPEScaleConfig)
    """The scaling of these frequencies."""

    init_std_scale: Literal["none", "layer", "stack"] = "layer"
    """The divisor of it in layers: none, from the depth of the layer, or from that of the stack."""

    shard_embed_dim: bool = True
    """Ignored: embeddings are split by symbols."""

    def gated_inner_dim(self, divisor: float = 1.0) -> int:
        """Return the inner width of the feed-forward networks: multiplied, scaled, divided, and rounded up, in this
        order.

        :raises ValueError: ``ffn_inner_dim_multiple_of`` is not positive, or the width is too large.
        """
        if self.ffn_inner_dim_multiple_of < 1:
            raise ValueError(f"`ffn_inner_dim_multiple_of` must be positive, but is {self.ffn_inner_dim_multiple_of}")

        try:
            dim = int(int(self.ffn_inner_dim * self.ffn_inner_dim_multiplier) * self.ffn_inner_dim_scale)
            dim = int(dim / divisor)
        except OverflowError as error:
            raise ValueError(f"`ffn_inner_dim` times its factors is too large: {error}") from None

        return -(-dim // self.ffn_inner_dim_multiple_of) * self.ffn_inner_dim_multiple_of


def llama_spec(config: LLaMAConfig, **others: Any) -> DecoderSpec:
    """Return the options of a model for a configuration, and ``others``.

    :raises ValueError: the values of the configuration make no model.
    """
    scaling = LLaMA3Scaling(**asdict(config.rope_scale)) if config.use_scaled_rope else None

    return DecoderSpec.of(config, ffn_inner_dim=config.gated_inner_dim(), rope_scaling=scaling, **others)


def llama_rope(theta: float) -> KeyGroup:
    """Return the entry of rotary frequencies that may be scaled as in LLaMA 3.1.

    :param theta: their base where a file states none.
    """

    def read(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
        rope_theta, scaling = read_rope(keys, "llama3", theta=theta)
        if scaling is None:
            return {"rope_theta": rope_theta}
        # Beside the scaling, it comes before the one in it.
        first = keys if "original_max_position_embeddings" in keys else scaling
        scale = LLaMARoPEScaleConfig(
            factor=scaling.number("factor", None),
            frequency_factors=(scaling.number("low_freq_factor", None), scaling.number("high_freq_factor", None)),
            original_context_length=first.count("original_max_position_embeddings", earlier["max_seq_len"]),
        )

        return {"rope_theta": rope_theta, "use_scaled_rope": True, "rope_scale": scale}

    return KeyGroup((*ROPE_KEYS, "original_max_position_embeddings"), read, _rope_keys)


def _rope_keys(config: LLaMAConfig) -> Mapping[str, object]:
    scale = config.rope_scale
    scaling = {
        "rope_type": "llama3",
        "factor": scale.factor,
        "low_freq_factor": scale.frequency_factors[0],
        "high_freq_factor": scale.frequency_factors[1],
        "original_max_position_embeddings": scale.original_context_length,
    }

    return {"rope_theta": config.rope_theta, "rope_scaling": scaling if config.use_scaled_rope else None}


CONFIG_JSON = ConfigTable(
    family="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    config_kls=LLaMAConfig,
    spec=llama_spec,
    entries=(
        SILU,
        Field("model_dim", "hidden_size", ConfigReader.count, 4096),
        Field("max_seq_len", "max_position_embeddings", ConfigReader.count, 2048),
        Field("vocab_size", "vocab_size", ConfigReader.count, 32_000),
        Field("pad_idx", "pad_token_id", ConfigReader.index),
        Field("tied_embeddings", "tie_word_embeddings", ConfigReader.flag, False),
        Field("num_layers", "num_hidden_layers", ConfigReader.layers, 32),
        Field("num_attn_heads", "num_attention_heads", ConfigReader.count, 32),
        Field("num_key_value_heads", "num_key_value_heads", ConfigReader.maybe_count, null="num_attn_heads"),
        Field("head_dim", "head_dim", ConfigReader.maybe_count, optional=True),
        # Both biases are one key; a configuration with one of them is refused when it is written.
        Field("output_proj_bias", "attention_bias", ConfigReader.flag, False),
        Field("qkv_proj_bias", "attention_bias", ConfigReader.flag, False),
        Field("ffn_inner_dim", "intermediate_size", ConfigReader.count, 11_008, write=LLaMAConfig.gated_inner_dim),
        Field("ffn_bias", "mlp_bias", ConfigReader.flag, False),
        Field("norm_eps", "rms_norm_eps", ConfigReader.number, 1e-6),
        llama_rope(10_000.0),
    ),
    fixed={"ffn_inner_dim_scale": 1.0, "ffn_inner_dim_multiple_of": 1},
    constants=NO_TOKENS,
    required={**CHANGES_EACH_DECODER, **NO_WINDOWS},
)
"""The keys of ``config.json``."""


FAMILY: Family[LLaMA, LLaMAConfig] = decoder_family(
    "lading.families.nn.decoder_models:LLaMA", llama_spec, CONFIG_JSON, rules=rules_of_adjacent_channels
)

get_llama_model_hub: ModelHubAccessor[LLaMA, LLaMAConfig] = ModelHubAccessor("llama", FAMILY.kls, LLaMAConfig)
