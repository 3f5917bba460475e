"""The names of Conformer layers in checkpoints of fairseq and fairseq2 → those in lading, relative to the layer.

Sources: fairseq (``fairseq/modules/conformer_layer.py``) and fairseq2 0.8.1 (``models/conformer/``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

RELATIVE: Final[Mapping[str, str]] = {
    "sdpa.r_proj.{p*}": "relative.projection.{p}",
    "sdpa.u_bias": "relative.bias.u",
    "sdpa.v_bias": "relative.bias.v",
}
"""fairseq2's names of relative positions, in attention."""

FAIRSEQ2: Final[Mapping[str, str]] = {
    "ffn1_layer_norm.{p*}": "ffn1_layer_norm.{p}",
    "ffn1.inner_proj.{p*}": "ffn1.intermediate_dense.{p}",
    "ffn1.output_proj.{p*}": "ffn1.output_dense.{p}",
    "self_attn_layer_norm.{p*}": "self_attn_layer_norm.{p}",
    **{f"self_attn.{name}_proj.{{p*}}": f"self_attn.{name}_proj.{{p}}" for name in "qkv"},
    "self_attn.output_proj.{p*}": "self_attn.out_proj.{p}",
    **{f"self_attn.{source}": f"self_attn.{target}" for source, target in RELATIVE.items()},
    "conv_layer_norm.{p*}": "conv_module.layer_norm.{p}",
    "conv.{p*}": "conv_module.{p}",
    "ffn2_layer_norm.{p*}": "ffn2_layer_norm.{p}",
    "ffn2.inner_proj.{p*}": "ffn2.intermediate_dense.{p}",
    "ffn2.output_proj.{p*}": "ffn2.output_dense.{p}",
    "layer_norm.{p*}": "final_layer_norm.{p}",
}

FAIRSEQ: Final[Mapping[str, str]] = {
    **{f"{ffn}.layer_norm.{{p*}}": f"{ffn}_layer_norm.{{p}}" for ffn in ("ffn1", "ffn2")},
    **{f"{ffn}.w_1.{{p*}}": f"{ffn}.intermediate_dense.{{p}}" for ffn in ("ffn1", "ffn2")},
    **{f"{ffn}.w_2.{{p*}}": f"{ffn}.output_dense.{{p}}" for ffn in ("ffn1", "ffn2")},
    "self_attn_layer_norm.{p*}": "self_attn_layer_norm.{p}",
    **{f"self_attn.linear_{name}.{{p*}}": f"self_attn.{name}_proj.{{p}}" for name in ("q", "k", "v", "out")},
    "self_attn.linear_pos.{p*}": "self_attn.relative.projection.{p}",
    "self_attn.pos_bias_u": "self_attn.relative.bias.u",
    "self_attn.pos_bias_v": "self_attn.relative.bias.v",
    "self_attn.{p*}": "self_attn.{p}",  # one of the two kinds of attention has the same names
    "conv_module.{p*}": "conv_module.{p}",
    "final_layer_norm.{p*}": "final_layer_norm.{p}",
}


def in_layers(names: Mapping[str, str], layer: str, ours: str) -> dict[str, str]:
    """Return the whole names for names inside of a layer.

    :param layer: the name of a layer in the checkpoint, with ``{n}`` for its index.
    :param ours: the name of a layer in lading.
    """
    return {f"{layer}.{source}": f"{ours}.{target}" for source, target in names.items()}
