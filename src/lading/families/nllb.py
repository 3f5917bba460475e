"""NLLB, No Language Left Behind (https://arxiv.org/abs/2207.04672): translation between 200 languages.

M2M-100 (https://arxiv.org/abs/2010.11125) has the same architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lading.families.config_json import ConfigReader, ConfigTable, Field
from lading.families.encoder_decoder_family import (
    CHANGES_EACH,
    NOT_READ,
    encoder_decoder_entries,
    encoder_decoder_family,
    encoder_decoder_rules,
    in_order_of,
)
from lading.families.nn.checks import shared_fields
from lading.families.nn.encoder_decoder_spec import EncoderDecoderSpec
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.planning.rules import Rule
from lading.system.deferred import deferred

if TYPE_CHECKING:
    from lading.families.nn.encoder_decoder import NLLB as NLLB
else:
    __getattr__ = deferred(globals(), NLLB="lading.families.nn.encoder_decoder")


@dataclass(kw_only=True)
class NllbConfig:
    """The configuration of an NLLB model; the defaults are those of the dense one with a billion parameters."""

    model_dim: int = 1024
    """The width of the model."""

    max_seq_len: int = 1024
    """The longest source and the longest target, in tokens."""

    vocab_size: int = 256_206
    """The number of symbols."""

    pad_idx: int = 0
    """The index of the symbol for padding. It tells two orders of the first four symbols apart: 0 for that of the
    tokenizer ``nllb`` (padding, unknown, begin, end), 1 for that of fairseq and Hugging Face (begin, padding, end,
    unknown)."""

    num_encoder_layers: int = 24
    """The number of encoder layers."""

    num_decoder_layers: int = 24
    """The number of decoder layers."""

    num_encoder_attn_heads: int = 16
    """The number of attention heads in encoder layers."""

    num_decoder_attn_heads: int = 16
    """The number of attention heads in decoder layers."""

    ffn_inner_dim: int = 8192
    """The inner width of the feed-forward networks."""

    dropout_p: float = 0.1
    """The dropout probability of the inputs of both stacks, and of the outputs of attention and feed-forward blocks."""


def _spec(config: NllbConfig) -> EncoderDecoderSpec:
    return EncoderDecoderSpec(
        **shared_fields(EncoderDecoderSpec, config),
        max_source_seq_len=config.max_seq_len,
        max_target_seq_len=config.max_seq_len,
        input_dropout_p=config.dropout_p,
        attn_dropout_p=0.0,
        ffn_inner_dropout_p=0.0,
    )


_FAIRSEQ_TABLES = {
    "encoder.embed_tokens.weight": "model.encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight": "model.decoder.embed_tokens.weight",
    "decoder.output_projection.weight": "lm_head.weight",
}

_ORDER = (1, 3, 0, 2)
"""The indices in fairseq's vocabulary of the symbols for padding, unknown words, begin and end."""


_NLLB_100 = 256_102
"""The number of symbols of NLLB-100, whose tables in fairseq's checkpoints have a row too many, the last."""


def _rules(config: NllbConfig, names: Sequence[str]) -> Sequence[Rule]:
    """Return the rules for a checkpoint.

    In fairseq's, the first symbols are in another order than in the vocabulary of the tokenizer. A checkpoint with
    ``shared.weight`` is not fairseq's but one of Hugging Face's without a head.
    """
    rows = config.vocab_size if config.vocab_size == _NLLB_100 else None
    tables: list[Rule] = []
    if config.pad_idx == 0 and "shared.weight" not in names:
        for source, target in _FAIRSEQ_TABLES.items():
            tables += in_order_of(_ORDER, source, target, rows=rows)

    return encoder_decoder_rules(*tables)


CONFIG_JSON = ConfigTable(
    family="nllb",
    model_type="m2m_100",
    architecture="M2M100ForConditionalGeneration",
    config_kls=NllbConfig,
    spec=_spec,
    entries=(
        *encoder_decoder_entries(layers=(12, 12), heads=16, model_dim=1024, inner=4096),
        Field("max_seq_len", "max_position_embeddings", ConfigReader.count, 1024),
        Field("vocab_size", "vocab_size", ConfigReader.count, 128_112),
    ),
    constants={"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "attention_dropout": 0.0},
    required={**CHANGES_EACH, "tie_word_embeddings": True},
    ignored=NOT_READ,
)
"""The keys of ``config.json``."""


FAMILY: Family[NLLB, NllbConfig] = encoder_decoder_family(
    CONFIG_JSON, "lading.families.nn.encoder_decoder:NLLB", _spec, rules_of_names=_rules
)

get_nllb_model_hub: ModelHubAccessor[NLLB, NllbConfig] = ModelHubAccessor("nllb", FAMILY.kls, NllbConfig)
