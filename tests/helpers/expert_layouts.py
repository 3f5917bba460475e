"""The layouts of experts in checkpoints: stacked, as transformers 5 has them in memory, and separate, as on the hub."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
"""The module, and the weights of an expert: gate, up and down."""


def separate(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Return the tensors of a model with stacked experts as its publisher names and cuts them."""
    module, gate, up, down = NAMES[family]
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, moe, rest = name.partition(".mlp.")
        if moe and rest.startswith("experts."):
            for e, weight in enumerate(tensor):
                parts = {gate: weight.chunk(2)[0], up: weight.chunk(2)[1]} if "gate_up" in rest else {down: weight}
                found |= {f"{layer}.{module}.experts.{e}.{part}.weight": value.clone() for part, value in parts.items()}
        elif moe and rest.startswith("gate."):
            found[f"{layer}.{module}.{rest}"] = tensor
        else:
            found[name] = tensor

    return found
