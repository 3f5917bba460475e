"""The parallel plan of the decoder-only language model."""

from __future__ import annotations

from lading.families.nn.decoder_spec import DecoderSpec
from lading.models.parallel_plan import ParallelPlan, Split, Stages


def decoder_plan(spec: DecoderSpec) -> ParallelPlan:
    """Return the parallel plan of a :class:`~lading.families.nn.decoder_lm.DecoderLM`.

    Tensor parallelism (https://arxiv.org/abs/1909.08053) splits attention by heads, feed-forward networks by their
    inner width, embedding and output by symbols. Parameters are sharded layer by layer, and pipeline stages are split
    between layers.
    """
    layer = "model.layers.*"
    attention = {
        "q_proj": Split.COLUMN,
        "k_proj": Split.KEY_VALUE,
        "v_proj": Split.KEY_VALUE,
        "o_proj": Split.ROW,
        "q_norm": Split.HEADS,
        "k_norm": Split.HEADS,
    }
    divisible = {"num_attn_heads": spec.num_attn_heads, "ffn_inner_dim": spec.ffn_inner_dim}
    if spec.norm_whole:
        # A normalization over all heads needs all of them on each rank.
        attention = dict.fromkeys(attention, Split.REPLICATED)
        del divisible["num_attn_heads"]

    return ParallelPlan(
        tensor={
            "model.embed_tokens": Split.VOCABULARY,
            **{f"{layer}.self_attn.{name}": split for name, split in attention.items()},
            f"{layer}.mlp.gate_proj": Split.COLUMN,
            f"{layer}.mlp.up_proj": Split.COLUMN,
            f"{layer}.mlp.down_proj": Split.ROW,
            f"{layer}.input_layernorm": Split.REPLICATED,
            f"{layer}.post_attention_layernorm": Split.REPLICATED,
            f"{layer}.pre_feedforward_layernorm": Split.REPLICATED,
            f"{layer}.post_feedforward_layernorm": Split.REPLICATED,
            "model.norm": Split.REPLICATED,
            "lm_head": Split.LOGITS,
        },
        divisible=divisible,
        num_key_value_heads=spec.num_key_value_heads,
        units=(layer,),
        stages=Stages(
            layers=layer,
            num_layers=spec.num_layers,
            first=("model.embed_tokens",),
            last=("model.norm", "lm_head"),
        ),
    )
