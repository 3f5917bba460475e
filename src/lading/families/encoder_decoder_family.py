"""The common part of the families with an encoder and a decoder: names of tensors, keys of ``config.json``, the family.

Sources for the names: fairseq (``models/transformer``, ``models/speech_to_text``) and fairseq2 0.8.1
(``models/nllb/interop.py``, ``models/s2t_transformer/interop.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from lading.errors import NotSupportedError
from lading.families.config_json import CHANGES_EACH_MODEL, ConfigReader, ConfigTable, Field, KeyGroup, same_for_all
from lading.families.name_rules import also_wrapped, layer_rules
from lading.families.nn.encoder_decoder_spec import EncoderDecoderSpec, encoder_decoder_plan
from lading.models.family import Family
from lading.planning.rules import Rule
from lading.system.deferred import deferred_call

if TYPE_CHECKING:
    from lading.families.nn.encoder_decoder import EncoderDecoder

ModelT = TypeVar("ModelT", bound="EncoderDecoder")
ConfigT = TypeVar("ConfigT")


def encoder_decoder_family(
    table: ConfigTable[ConfigT], kls: str, spec: Callable[[ConfigT], EncoderDecoderSpec], **others: Any
) -> Family[ModelT, ConfigT]:
    """Return the family of the models of ``kls``.

    :param table: the keys of ``config.json``.
    :param kls: the place of the class, as :class:`~lading.models.family.Family` takes it.
    :param spec: the options of the model for a configuration.
    :param others: the fields of the family that are not those of all encoders with a decoder.
    """
    init = deferred_call("lading.families.nn.encoder_decoder:init_encoder_decoder")
    create = deferred_call(kls)

    return Family(
        name=table.family,
        kls=kls,
        config_kls=table.config_kls,
        build=lambda config: create(spec(config)),
        init=lambda model, config, name, parameter: init(model, name, parameter),
        shapes=lambda config: spec(config).shapes(),
        parallel_plan=lambda config: encoder_decoder_plan(spec(config)),
        hf_model_types=frozenset({table.model_type}),
        from_hf=table.read,
        hf_stated=table.stated,
        to_hf=lambda config: _write(table, config),
        **others,
    )


# --- checkpoints ------------------------------------------------------------------------------------------------------

_FAIRSEQ2 = {
    "self_attn.output_proj": "self_attn.out_proj",
    "encoder_decoder_attn.output_proj": "encoder_attn.out_proj",
    "encoder_decoder_attn": "encoder_attn",
    "encoder_decoder_attn_layer_norm": "encoder_attn_layer_norm",
    "ffn.inner_proj": "fc1",
    "ffn.output_proj": "fc2",
    "ffn_layer_norm": "final_layer_norm",
}
"""fairseq2's names of the modules of a layer → their names in lading, which are fairseq's, too."""


def encoder_decoder_rules(*first: Rule) -> Sequence[Rule]:
    """Return the rules for the names of fairseq and fairseq2, and of Hugging Face's models without a head.

    :param first: the rules of a family, which come before those of all.
    """
    return also_wrapped((*first, *_common_rules()))


def _common_rules() -> Iterator[Rule]:
    for prefix in ("", "model."):
        for side in ("encoder", "decoder"):
            # Buffers that the model computes, or that say which version of fairseq wrote the file.
            for name in ("version", "embed_positions._float_tensor", "embed_positions.weights"):
                yield Rule(f"{prefix}{side}.{name}", None, computed=True)
    for side in ("encoder", "decoder"):
        yield from layer_rules(f"{side}.layers.{{n}}", _FAIRSEQ2, ours=f"model.{side}.layers.{{n}}")
        yield Rule(f"{side}_frontend.embed.weight", f"model.{side}.embed_tokens.weight")
    yield Rule("final_proj.weight", "lm_head.weight")
    yield Rule("decoder.output_projection.weight", "lm_head.weight")
    yield Rule("encoder.{p*}", "model.encoder.{p}")
    yield Rule("decoder.{p*}", "model.decoder.{p}")
    yield Rule("shared.weight", "model.shared.weight")


# --- keys of config.json ----------------------------------------------------------------------------------------------


def _read_pad_idx(keys: ConfigReader, key: str, default: int) -> int:
    value = keys.index(key, default)
    if value != 1:
        # Positions of transformers count from the one after it, and those of these families from 2.
        keys.refuse(key, value, (1,))

    return 1


def _read_ffn_inner_dim(keys: ConfigReader, default: int) -> Mapping[str, Any]:
    inner = keys.count("encoder_ffn_dim", default)
    if keys.count("decoder_ffn_dim", default) != inner:
        keys.mismatch("decoder_ffn_dim", f"the encoder_ffn_dim of {inner}, as in all models of this family")

    return {"ffn_inner_dim": inner}


def encoder_decoder_entries(*, layers: tuple[int, int], heads: int, model_dim: int, inner: int) -> list[Any]:
    """Return the keys of ``config.json`` that all encoders with a decoder have, with the values where one is absent."""
    return [
        same_for_all("activation_function", "relu"),
        Field("model_dim", "d_model", ConfigReader.count, model_dim),
        Field("pad_idx", "pad_token_id", _read_pad_idx, 1),
        Field("num_encoder_layers", "encoder_layers", ConfigReader.layers, layers[0]),
        Field("num_decoder_layers", "decoder_layers", ConfigReader.layers, layers[1]),
        Field("num_encoder_attn_heads", "encoder_attention_heads", ConfigReader.count, heads),
        Field("num_decoder_attn_heads", "decoder_attention_heads", ConfigReader.count, heads),
        KeyGroup(
            ("encoder_ffn_dim", "decoder_ffn_dim"),
            lambda keys, earlier: _read_ffn_inner_dim(keys, inner),
            lambda config: {"encoder_ffn_dim": config.ffn_inner_dim, "decoder_ffn_dim": config.ffn_inner_dim},
        ),
        Field("dropout_p", "dropout", ConfigReader.number, 0.1),
    ]


CHANGES_EACH: Final[Mapping[str, object]] = {**CHANGES_EACH_MODEL, "scale_embedding": True}
"""The keys that change the results of transformers, with the only value that a family supports."""

NOT_READ: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("activation_dropout", "attention_dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std"), "training"
    ),
    **dict.fromkeys(
        ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "num_beams", "early_stopping"),
        "text generation",
    ),
    "num_hidden_layers": "another name of encoder_layers, which each file has, too",
    "tokenizer_class": "the tokenizer says it",
}
"""The keys that do not change the results of a model, and the reasons."""


def _write(table: ConfigTable[ConfigT], config: ConfigT) -> Mapping[str, object]:
    pad_idx: object = config.pad_idx  # type: ignore[attr-defined]
    if pad_idx != 1:
        raise NotSupportedError(
            f"A config.json of the type {table.model_type!r} cannot describe this configuration of the {table.family} "
            f"family: its `pad_idx` is {pad_idx}, but positions of such a model are right with 1 only. Export the "
            "checkpoint in lading's names: `lading convert`."
        )

    return table.write(config)


def in_order_of(tokens: Sequence[int], source: str, target: str, *, rows: int | None = None) -> Iterator[Rule]:
    """Yield the rules that make a table from one with the first tokens in another order.

    :param tokens: the position in ``source`` of each of the first tokens of ``target``.
    :param rows: the rows of ``source`` to use; default: all.
    """
    first = len(tokens)
    for i, token in enumerate(tokens):
        yield Rule(source, target, cut=(0, token, 1), concat=(0, i))
    yield Rule(source, target, cut=(0, first, None if rows is None else rows - first), concat=(0, first))
