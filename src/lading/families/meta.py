"""Decoders as Meta publishes them, and as fairseq2 saves them: other names, and another layout of rotary embeddings.

Their rotary embeddings turn neighbouring channels of a head together, where Hugging Face's turn its two halves (as
fairseq2's Qwen does, too); the rows of the projections of queries and keys are re-ordered accordingly. How Meta's
model-parallel shards and fairseq2's ranks cut a tensor needs no rule: :mod:`lading.keymap`.

Sources: https://github.com/meta-llama/llama-models (``models/llama3/model.py``) and fairseq2 0.8.1
(``models/llama/interop.py``) for the names; transformers (``models/llama/convert_llama_weights_to_hf.py``) for the
layout.
"""

from __future__ import annotations

from collections.abc import Sequence

from lading.compose import Regroup
from lading.keymap import Rule


def meta_rules(head_dim: int) -> Sequence[Rule]:
    """Rules for tensors with Meta's names, ``layers.0.attention.wq.weight`` …, which Mistral took over."""
    layer, target = "layers.{n}.", "model.layers.{n}."
    turned = Regroup(0, head_dim // 2, 2)

    return (
        Rule("rope.freqs", None),
        Rule("tok_embeddings.weight", "model.embed_tokens.weight"),
        Rule("output.weight", "lm_head.weight"),
        Rule(f"{layer}attention.wq.{{rest*}}", f"{target}self_attn.q_proj.{{rest}}", order=turned),
        Rule(f"{layer}attention.wk.{{rest*}}", f"{target}self_attn.k_proj.{{rest}}", order=turned),
        Rule(f"{layer}attention.wv.{{rest*}}", f"{target}self_attn.v_proj.{{rest}}"),
        Rule(f"{layer}attention.wo.{{rest*}}", f"{target}self_attn.o_proj.{{rest}}"),
        Rule(f"{layer}attention_norm.weight", f"{target}input_layernorm.weight"),
        Rule(f"{layer}feed_forward.w1.{{rest*}}", f"{target}mlp.gate_proj.{{rest}}"),
        Rule(f"{layer}feed_forward.w2.{{rest*}}", f"{target}mlp.down_proj.{{rest}}"),
        Rule(f"{layer}feed_forward.w3.{{rest*}}", f"{target}mlp.up_proj.{{rest}}"),
        Rule(f"{layer}ffn_norm.weight", f"{target}post_attention_layernorm.weight"),
    )


def fairseq2_rules(head_dim: int | None) -> Sequence[Rule]:
    """Rules for tensors with the names of fairseq2's decoders, ``decoder.layers.0.self_attn.q_proj.weight`` …

    :param head_dim: where rotary embeddings turn neighbouring channels; ``None`` where they turn the halves of a head.
    """
    layer, target = "decoder.layers.{n}.", "model.layers.{n}."
    turned = None if head_dim is None else Regroup(0, head_dim // 2, 2)

    return (
        Rule("decoder_frontend.embed.weight", "model.embed_tokens.weight"),
        Rule("decoder.layer_norm.weight", "model.norm.weight"),
        Rule("final_proj.weight", "lm_head.weight"),
        Rule(f"{layer}self_attn.q_proj.{{rest*}}", f"{target}self_attn.q_proj.{{rest}}", order=turned),
        Rule(f"{layer}self_attn.k_proj.{{rest*}}", f"{target}self_attn.k_proj.{{rest}}", order=turned),
        Rule(f"{layer}self_attn.output_proj.{{rest*}}", f"{target}self_attn.o_proj.{{rest}}"),
        Rule(f"{layer}self_attn.{{rest*}}", f"{target}self_attn.{{rest}}"),
        Rule(f"{layer}self_attn_layer_norm.weight", f"{target}input_layernorm.weight"),
        Rule(f"{layer}ffn.gate_proj.{{rest*}}", f"{target}mlp.gate_proj.{{rest}}"),
        Rule(f"{layer}ffn.output_proj.{{rest*}}", f"{target}mlp.down_proj.{{rest}}"),
        Rule(f"{layer}ffn.inner_proj.{{rest*}}", f"{target}mlp.up_proj.{{rest}}"),
        Rule(f"{layer}ffn_layer_norm.weight", f"{target}post_attention_layernorm.weight"),
    )
