"""Names of tensors in checkpoints of decoders, also of Meta and fairseq2, whose layout of rotary embeddings is another.

Their rotary embeddings turn neighboring channels of a head together, where Hugging Face's turn its two halves (as
fairseq2's Qwen and OLMo do, too); the rows of the projections of queries and keys are re-ordered accordingly. How
Meta's model-parallel shards and fairseq2's ranks cut a tensor needs no rule: :mod:`lading.planning.rules`.

Sources: https://github.com/meta-llama/llama-models (``models/llama3/model.py``) and fairseq2 0.8.1
(``models/llama/interop.py``, ``models/olmo/interop.py``) for the names; transformers
(``models/llama/convert_llama_weights_to_hf.py``) for the layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from lading.families.config_json import BY_ITS_OWN_CLASS
from lading.planning.composition import Regroup
from lading.planning.rules import Rule

HEAD = re.compile(r"(lm_head|score|classifier|qa_outputs|v_head|value_head|regression_head)\..*")
"""The names of parameters of a head, after the last layer."""

DECODER_RULES: Final[Sequence[Rule]] = (
    # Old versions of transformers save these computed buffers.
    Rule("{prefix*}rotary_emb.inv_freq", None, computed=True),
    Rule("rotary_emb.inv_freq", None, computed=True),
    # Heads that draft further tokens, which transformers skips too.
    Rule("mtp.{rest*}", None),
    Rule("model.mtp.{rest*}", None),
    # A checkpoint of the model without its head lacks the prefix.
    Rule("embed_tokens.weight", "model.embed_tokens.weight"),
    Rule("layers.{n}.{rest*}", "model.layers.{n}.{rest}"),
    Rule("norm.weight", "model.norm.weight"),
)


def text_part_rules(*others: str) -> Sequence[Rule]:
    """Return the rules for the names of the decoder in a multimodal model, in files and in transformers 5.

    :param others: the names of the modules beside the decoder, which are not loaded.
    """
    return (
        Rule("language_model.model.{rest*}", "model.{rest}"),
        Rule("language_model.lm_head.weight", "lm_head.weight"),
        Rule("model.language_model.{rest*}", "model.{rest}"),
        *(Rule(f"{prefix}{name}.{{rest*}}", None) for prefix in ("", "model.") for name in others),
    )


def explain_head(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """Return advice for a checkpoint of a decoder with another head than that of a language model, or without a head.

    :param missing: names of parameters that it lacks.
    :param unexpected: names of tensors that no rule knows.
    """
    if not (missing or unexpected) or not all(HEAD.fullmatch(name) for name in (*missing, *unexpected)):
        return None
    what = "has another head than a language model" if unexpected else "has no head"

    return f"The checkpoint {what}: see `architectures` in its config.json. {BY_ITS_OWN_CLASS}"


def also_wrapped(rules: Sequence[Rule]) -> Sequence[Rule]:
    """Return ``rules``, and the same for names that start with ``module.``, as ``DistributedDataParallel`` has them."""
    return (*rules, *(replace(rule, source=f"module.{rule.source}") for rule in rules))


_META = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "ffn_norm": "post_attention_layernorm",
}
"""Meta's names of the modules of a layer → their names in lading."""

_FAIRSEQ2 = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.output_proj": "self_attn.o_proj",
    "self_attn.q_norm": "self_attn.q_norm",
    "self_attn.k_norm": "self_attn.k_norm",
    "self_attn_layer_norm": "input_layernorm",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.output_proj": "mlp.down_proj",
    "ffn.inner_proj": "mlp.up_proj",
    "ffn_layer_norm": "post_attention_layernorm",
}
"""fairseq2's names of these modules."""

_FAIRSEQ2_AFTER = _FAIRSEQ2 | {
    "self_attn_layer_norm": "post_attention_layernorm",
    "ffn_layer_norm": "post_feedforward_layernorm",
}
"""fairseq2's names in models with normalizations after each block, as in OLMo."""


def expert_rules(
    module: str = "mlp",
    *,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    prefix: str = "model.",
) -> Iterator[Rule]:
    """Yield the rules for experts with separate weights, ``…mlp.experts.0.gate_proj.weight`` …, as on the hub.

    :param module: the name of the mixture of experts in a layer; likewise those of the three weights of an expert.
    :param prefix: the prefix of the layers, which a checkpoint of the model without its head lacks.
    """
    layer, ours = f"{prefix}layers.{{n}}.{module}", "model.layers.{n}.mlp"
    for name, target, concat in (
        (gate, "gate_up_proj", (0, 0)),
        (up, "gate_up_proj", (0, 1)),
        (down, "down_proj", None),
    ):
        yield Rule(f"{layer}.experts.{{e}}.{name}.weight", f"{ours}.experts.{target}", stack="e", concat=concat)
    if module != "mlp":
        yield Rule(f"{layer}.gate.weight", f"{ours}.gate.weight")


def rules_of_adjacent_channels(config: Any) -> Sequence[Rule]:
    """Return the rules for Meta's names, ``layers.0.attention.wq.weight`` …, which Mistral also uses, and fairseq2's.

    :param config: that of a decoder whose rotary embeddings turn neighboring channels in both.
    """
    head_dim = config.head_dim or config.model_dim // config.num_attn_heads

    return (*meta_rules(head_dim), *fairseq2_rules(head_dim))


def meta_rules(head_dim: int | None = None, *, ffn: str = "mlp") -> Sequence[Rule]:
    """Return the rules for Meta's names, ``layers.0.attention.wq.weight`` …

    The parameters are those of :func:`fairseq2_rules`.
    """
    return (
        Rule("rope.freqs", None, computed=True),
        Rule("tok_embeddings.weight", "model.embed_tokens.weight"),
        Rule("output.weight", "lm_head.weight"),
        *layer_rules("layers.{n}", _with_ffn(_META, ffn), head_dim),
    )


def fairseq2_rules(head_dim: int | None = None, *, norms_after: bool = False, ffn: str = "mlp") -> Sequence[Rule]:
    """Return the rules for the names of fairseq2's decoders, ``decoder.layers.0.self_attn.q_proj.weight`` …

    :param head_dim: where rotary embeddings turn neighboring channels; ``None`` where they turn the halves of a head.
    :param norms_after: whether the layers normalize the outputs of their blocks.
    :param ffn: the name of the feed-forward networks in lading.
    """
    names = _FAIRSEQ2_AFTER if norms_after else _FAIRSEQ2

    return (
        Rule("decoder_frontend.embed.weight", "model.embed_tokens.weight"),
        Rule("decoder.layer_norm.weight", "model.norm.weight"),
        Rule("final_proj.weight", "lm_head.weight"),
        *layer_rules("decoder.layers.{n}", _with_ffn(names, ffn), head_dim),
        *DECODER_RULES,
    )


def _with_ffn(names: Mapping[str, str], ffn: str) -> Mapping[str, str]:
    return {source: target.replace("mlp.", f"{ffn}.") for source, target in names.items()}


def layer_rules(
    layer: str, names: Mapping[str, str], head_dim: int | None = None, *, ours: str = "model.layers.{n}"
) -> Iterator[Rule]:
    """Yield the rules for the modules of each layer.

    :param layer: the name of a layer in the checkpoint, with ``{n}`` for its index.
    :param names: the names of modules in the checkpoint → their names in lading.
    :param head_dim: as :func:`fairseq2_rules` takes it.
    :param ours: the name of a layer in lading.
    """
    turned = None if head_dim is None else Regroup(0, head_dim // 2, 2)
    for source, target in names.items():
        order = turned if target in ("self_attn.q_proj", "self_attn.k_proj") else None
        yield Rule(f"{layer}.{source}.{{rest*}}", f"{ours}.{target}.{{rest}}", order=order)
