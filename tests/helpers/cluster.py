"""A disk of a small team, as a new user has it: forty folders of checkpoints of all kinds, tiny."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.make_adapter import write_adapter
from tests.helpers.make_checkpoint import CONFIG

README = """\
---
license: apache-2.0
base_model: team/base
pipeline_tag: text-generation
---
"""


def state_of(*, dim: int = 32, layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The weights of a Qwen 3 of any size, with four heads of eight."""
    generator = torch.Generator().manual_seed(dim)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul(0.1).to(dtype)

    state = {"model.embed_tokens.weight": random(100, dim), "model.norm.weight": random(dim)}
    for n in range(layers):
        layer = f"model.layers.{n}"
        shapes = {
            "input_layernorm": (dim,), "post_attention_layernorm": (dim,), "self_attn.q_norm": (8,),
            "self_attn.k_norm": (8,), "self_attn.q_proj": (32, dim), "self_attn.k_proj": (16, dim),
            "self_attn.v_proj": (16, dim), "self_attn.o_proj": (dim, 32), "mlp.gate_proj": (64, dim),
            "mlp.up_proj": (64, dim), "mlp.down_proj": (dim, 64),
        }  # fmt: skip
        state |= {f"{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}

    return state


def write(folder: Path, state: Mapping[str, Tensor], *, shards: int = 1, **config: object) -> Path:
    """Write a Hugging Face folder."""
    folder.mkdir(parents=True)
    layers = 1 + max(int(name.split(".")[2]) for name in state if ".layers." in name)
    sizes = {"hidden_size": len(state["model.norm.weight"]), "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(CONFIG | sizes | config))
    if shards == 1:
        save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    weight_map = {}
    for n in range(shards):
        name = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(state.items())[n::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return folder


def build(root: Path) -> Path:
    """Write forty folders: base models, fine-tunes, other sizes and dtypes, and what cannot be loaded."""
    base = state_of()
    write(root / "base", base)
    for n in range(12):  # fine-tunes of the last layer
        tuned = {k: v + 0.01 * (n + 1) if ".layers.1.mlp" in k else v for k, v in base.items()}
        folder = write(root / f"tuned-{n:02}", tuned)
        (folder / "README.md").write_text(README)
    for n in range(8):
        write(root / f"size-{n}", state_of(dim=40 + 8 * n, layers=1 + n % 4))
    for n in range(4):
        write(root / f"float-{n}", state_of(dim=32 + 8 * n, dtype=torch.float32))
    for n in range(4):
        write(root / f"sharded-{n}", state_of(layers=2 + n), shards=2 + n)
    for n in range(3):
        folder = write(root / f"pickled-{n}", state_of(layers=1 + n))
        (folder / "model.safetensors").unlink()
        torch.save(state_of(layers=1 + n), folder / "pytorch_model.bin")

    change = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.full((2, 32), 0.1)}
    change |= {"model.layers.0.self_attn.q_proj.lora_B.weight": torch.full((32, 2), 0.1)}
    write_adapter(root / "lora", change, base_model_name_or_path=str(root / "base"))
    _write_distributed(write(root / "distributed", base), base)
    write(root / "awq", base, quantization_config={"quant_method": "awq", "bits": 4})
    (root / "gguf").mkdir()
    (root / "gguf" / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    (root / "linked").symlink_to(root / "tuned-00")
    (root / "notes").mkdir()
    (root / "notes" / "README.md").write_text("no model")
    write(root / "half", state_of(), shards=2)
    (root / "half" / "model-00002-of-00002.safetensors").unlink()
    (root / "empty").mkdir()

    return root


def _write_distributed(folder: Path, state: Mapping[str, Tensor]) -> None:
    import torch.distributed.checkpoint as dcp

    (folder / "model.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        dcp.save({"model": dict(state), "step": torch.tensor(3)}, checkpoint_id=folder)
