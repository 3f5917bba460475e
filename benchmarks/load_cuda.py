"""How fast a checkpoint becomes a model on a GPU, beside what else there is.

    python benchmarks/load_cuda.py                    # warm and cold, all peers that are installed
    python benchmarks/load_cuda.py --rounds 9 --save h100

The checkpoint is a Qwen 3 of 8.2 billion parameters (16.4 GB) with bfloat16 weights, in shards of 4 GB; its values
repeat, as nothing here depends on them. "limit" copies as many bytes from one pinned buffer to the device: what the
link can do. Each run is a fresh process with a device that was used before the clock starts; contenders take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
from harness import DATA

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 4_096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
CARD = "name: bench_8b\nbase: qwen3_8b\ncheckpoint: checkpoint_8b\n"
DTYPE_BYTES = 2
SHARD_BYTES = 4_000_000_000

Loader = Callable[[], Any]


def folder() -> Path:
    """Where the checkpoint is."""
    return DATA / "checkpoint_8b"


def shards() -> list[Path]:
    """The files of the checkpoint."""
    return sorted(folder().glob("*.safetensors"))


def make_checkpoint() -> None:
    """Write the checkpoint once, shard by shard, and a catalog that knows it."""
    if not (folder() / "model.safetensors.index.json").exists():
        import torch
        from safetensors.torch import save_file

        from lading.families.qwen import get_qwen_model_hub
        from lading.models.construct import build_on_meta
        from lading.models.family import get_family

        print(f"writing 16.4 GB to {folder()}", file=sys.stderr)
        folder().mkdir(parents=True, exist_ok=True)
        module = build_on_meta(get_family("qwen"), get_qwen_model_hub().get_arch_config("qwen3_8b"))
        parts: list[dict[str, torch.Tensor]] = [{}]
        size = 0
        for name, parameter in module.named_parameters():
            size += parameter.numel() * DTYPE_BYTES
            if size > SHARD_BYTES:
                parts.append({})
                size = parameter.numel() * DTYPE_BYTES
            parts[-1][name] = parameter

        pattern = torch.randn(1 << 20).mul(0.02).bfloat16()
        weight_map: dict[str, str] = {}
        for n, part in enumerate(parts, start=1):
            file = f"model-{n:05}-of-{len(parts):05}.safetensors"
            values = {
                name: pattern.repeat(-(-meta.numel() // pattern.numel()))[: meta.numel()].view(meta.shape).clone()
                for name, meta in part.items()
            }
            save_file(values, folder() / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (folder() / "config.json").write_text(json.dumps(CONFIG))
        (folder() / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    (DATA / "cards_8b.yaml").write_text(CARD)
    harness.make_catalog(DATA / "catalog_8b.sqlite", ["import", str(DATA / "cards_8b.yaml")], ["index", "bench_8b"])


def lading(dtype: str) -> Callable[[], Loader]:
    """``load_model`` from the catalog to the model."""

    def prepare() -> Loader:
        os.environ["LADING_DATABASE_URL"] = f"sqlite:///{DATA / 'catalog_8b.sqlite'}"
        import torch

        harness.import_lading("qwen")
        from lading.models.hub import load_model

        named = "auto" if dtype == "auto" else getattr(torch, dtype)

        return lambda: load_model("bench_8b", device="cuda", dtype=named, progress=False)

    return prepare


def safetensors() -> Loader:
    """``safetensors.torch.load_file``."""
    from safetensors.torch import load_file

    return lambda: {k: v for shard in shards() for k, v in load_file(shard, device="cuda").items()}


def transformers() -> Loader:
    """``from_pretrained(device_map="cuda")``."""
    import torch
    from transformers import Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return lambda: Qwen3ForCausalLM.from_pretrained(folder(), dtype=torch.bfloat16, device_map="cuda")


def fastsafetensors() -> Loader:
    """fastsafetensors without GPU direct storage."""
    from fastsafetensors import fastsafe_open

    def load() -> dict[str, Any]:
        with fastsafe_open(filenames=[str(s) for s in shards()], nogds=True, device="cuda:0") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    return load


def limit() -> Loader:
    """As many bytes from one pinned buffer to the device."""
    import torch

    chunk = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    total = sum(s.stat().st_size for s in shards())

    def load() -> dict[str, Any]:
        target = torch.empty(total, dtype=torch.uint8, device="cuda")
        for at in range(0, total, chunk.numel()):
            part = target[at : at + chunk.numel()]
            part.copy_(chunk[: part.numel()], non_blocking=True)
        return {"all": target}

    return load


CONTENDERS: dict[str, tuple[Callable[[], Loader], str | None]] = {
    "lading": (lading(dtype="auto"), None),
    "lading float16": (lading(dtype="float16"), None),
    "safetensors": (safetensors, "safetensors"),
    "transformers": (transformers, "accelerate"),
    "fastsafetensors": (fastsafetensors, "fastsafetensors"),
    "limit": (limit, None),
}
BARS = [
    ("of the link", "lading", "limit", 1 / 0.9),
    ("peers", "lading", "safetensors", 1.0),
    ("peers", "lading", "transformers", 1.0),
    ("peers", "lading", "fastsafetensors", 1.0),
]


def run_one(name: str, cold: bool) -> None:
    """Run one contender in this process, and print what was measured as JSON."""
    import torch

    load = CONTENDERS[name][0]()
    torch.zeros(1, device="cuda").add_(1)
    torch.cuda.synchronize()
    (harness.evict if cold else harness.warm)(shards())
    torch.cuda.reset_peak_memory_stats()

    figures = harness.timed(load, lambda result: torch.cuda.synchronize())
    print(json.dumps(figures | {"device_peak_bytes": torch.cuda.max_memory_allocated()}))


def main() -> None:
    """Run everything, print it, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--save", metavar="NAME", help="keep the figures as benchmarks/results/NAME.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.one:
        run_one(options.one, options.cold)
        return

    import torch

    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here: there is nothing to measure.")

    make_checkpoint()
    names = [
        name
        for name in options.only or CONTENDERS
        if CONTENDERS[name][1] is None or importlib.util.find_spec(str(CONTENDERS[name][1])) is not None
    ]
    results = {"benchmark": "load_cuda", "machine": harness.machine(), "rounds": options.rounds}
    for temperature in ("warm", "cold"):
        flag = ["--cold"] if temperature == "cold" else []
        commands = {name: [sys.executable, __file__, "--one", name, *flag] for name in names}
        found = harness.interleave(commands, options.rounds)
        results[temperature] = found
        bars = BARS if temperature == "warm" else BARS[1:]
        print(f"\n{temperature}\n\n{harness.table(found)}\n\n{harness.ratios(found, bars)}", flush=True)

    if options.save:
        harness.save(options.save, results)


if __name__ == "__main__":
    main()
