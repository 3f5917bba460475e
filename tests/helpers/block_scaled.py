"""Float8 weights with a scale for each block, as DeepSeek publishes them; and a second account of their values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

QUANTIZATION: Mapping[str, object] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def expand(scales: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the scale of each element."""
    scales = scales.repeat_interleave(128, -2).repeat_interleave(128, -1)

    return scales[..., : shape[-2], : shape[-1]]


def quantize(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Return numbers and scales whose products are near ``weight``."""
    *outer, rows, columns = weight.shape
    down, across = -(-rows // 128), -(-columns // 128)
    padded = torch.zeros(*outer, down * 128, across * 128)
    padded[..., :rows, :columns] = weight.float()
    blocks = padded.unflatten(-2, (down, 128)).unflatten(-1, (across, 128))
    scales = blocks.abs().amax((-3, -1)).clamp_min(1e-6) / torch.finfo(dtype).max

    return (weight.float() / expand(scales, weight.shape)).to(dtype), scales


def values(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the plain tensor: each number times its scale."""
    return (numbers.float() * expand(scales, numbers.shape)).to(dtype)


def quantize_folder(
    folder: Path, chosen: Callable[[str], bool] = lambda name: "proj" in name and name.endswith("weight")
) -> dict[str, Tensor]:
    """Quantize weights of a checkpoint of one file in place; return the plain values of all tensors in float32."""
    plain: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if chosen(name):
            numbers, scales = quantize(tensor)
            stored |= {name: numbers, f"{name}_scale_inv": scales}
            plain[name] = values(numbers, scales, torch.float32)
        else:
            stored[name] = tensor
            plain[name] = tensor.float()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}))

    return plain
