"""Decoders as Meta publishes them, and as fairseq2 saves them: other names, and another layout of rotary embeddings.

Their rotary embeddings turn neighbouring channels of a head together, where Hugging Face's turn its two halves (as
fairseq2's Qwen and OLMo do, too); the rows of the projections of queries and keys are re-ordered accordingly. How
Meta's model-parallel shards and fairseq2's ranks cut a tensor needs no rule: :mod:`lading.planning.rules`.

Sources: https://github.com/meta-llama/llama-models (``models/llama3/model.py``) and fairseq2 0.8.1
(``models/llama/interop.py``, ``models/olmo/interop.py``) for the names; transformers
(``models/llama/convert_llama_weights_to_hf.py``) for the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lading.planning.composition import Regroup
from lading.planning.rules import Rule

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


def meta_rules(head_dim: int) -> Sequence[Rule]:
    """Return the rules for Meta's names, ``layers.0.attention.wq.weight`` …, which Mistral also uses."""
    return (
        Rule("rope.freqs", None),
        Rule("tok_embeddings.weight", "model.embed_tokens.weight"),
        Rule("output.weight", "lm_head.weight"),
        *_layer_rules("layers.{n}", _META, head_dim),
    )


def fairseq2_rules(head_dim: int | None, *, norms_after: bool = False) -> Sequence[Rule]:
    """Return the rules for the names of fairseq2's decoders, ``decoder.layers.0.self_attn.q_proj.weight`` …

    :param head_dim: where rotary embeddings turn neighbouring channels; ``None`` where they turn the halves of a head.
    :param norms_after: whether the normalisations of a layer are of what its blocks compute.
    """
    return (
        Rule("decoder_frontend.embed.weight", "model.embed_tokens.weight"),
        Rule("decoder.layer_norm.weight", "model.norm.weight"),
        Rule("final_proj.weight", "lm_head.weight"),
        *_layer_rules("decoder.layers.{n}", _FAIRSEQ2_AFTER if norms_after else _FAIRSEQ2, head_dim),
    )


def _layer_rules(layer: str, names: Mapping[str, str], head_dim: int | None) -> Iterator[Rule]:
    turned = None if head_dim is None else Regroup(0, head_dim // 2, 2)
    for source, target in names.items():
        order = turned if target in ("self_attn.q_proj", "self_attn.k_proj") else None
        yield Rule(f"{layer}.{source}.{{rest*}}", f"model.layers.{{n}}.{target}.{{rest}}", order=order)
