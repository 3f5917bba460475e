"""How fast a checkpoint becomes a model on the CPU, beside what else there is.

    python benchmarks/load_cpu.py                     # all states, all peers that are installed
    python benchmarks/load_cpu.py --rounds 9 --only lading safetensors floor
    FAIRSEQ2_PYTHON=/path/to/venv/bin/python python benchmarks/load_cpu.py

The checkpoint is a Qwen 3 of 2.15 GB with random bfloat16 weights in five shards, written by transformers. Each run
is a fresh process; the contenders take turns, so that a machine that slows down slows all of them. "total" is the load
plus touching every page of every parameter, without which mapping would look free. Memory is the peak beyond the level
after imports. Absolute times move from machine to machine; the ratios are what counts.

Three states: *as found*, files in the page cache and memory as after a rest of three seconds, as people find their
machines; *backed*, the same, but memory was touched and freed just before, so that a virtual machine's host has it at
hand; *cold*, files on the disk, memory backed. The first two are one interleaved run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import mmap
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
from harness import DATA

CONFIG = {
    "vocab_size": 65_536,
    "hidden_size": 2_048,
    "intermediate_size": 6_144,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}

CARD = """\
name: bench
model_family: qwen
model_config:
  model_dim: 2048
  vocab_size: 65536
  tied_embeddings: false
  num_layers: 16
  num_attn_heads: 16
  num_key_value_heads: 8
  head_dim: 128
  qkv_proj_bias: false
  q_norm: true
  k_norm: true
  ffn_inner_dim: 6144
checkpoint: checkpoint
---
name: bench_hg
model_family: hg
model_arch: causal_lm
checkpoint: checkpoint
"""


# --- the checkpoint --------------------------------------------------------------------------------------------------


def make_checkpoint(catalog: Path = DATA / "catalog.sqlite") -> Path:
    """Write the checkpoint once, and a catalog that knows it."""
    folder = DATA / "checkpoint"
    if not (folder / "model.safetensors.index.json").exists():
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        print(f"writing 2.15 GB to {folder}", file=sys.stderr)
        with torch.device("meta"):
            model = Qwen3ForCausalLM(Qwen3Config(**CONFIG)).to(torch.bfloat16)
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.normal_(std=0.02)
        model.save_pretrained(folder, max_shard_size="500MB")

    (DATA / "cards.yaml").write_text(CARD)
    harness.make_catalog(catalog, ["import", str(DATA / "cards.yaml")], ["verify", "bench"])

    return folder


def shards(folder: Path) -> list[Path]:
    """The files of the checkpoint."""
    return sorted(folder.glob("*.safetensors"))


# --- contenders: each imports what it needs, and returns what is timed -----------------------------------------------

Loader = Callable[[], Any]


def lading(**options: Any) -> Callable[[Path], Loader]:
    """``load_model`` from the catalog to the model."""

    def prepare(folder: Path) -> Loader:
        os.environ["LADING_DATABASE_URL"] = f"sqlite:///{DATA / 'catalog.sqlite'}"
        harness.import_lading("qwen")
        from lading.models.hub import load_model

        return lambda: load_model("bench", progress=False, **options)

    return prepare


def lading_hg(folder: Path) -> Loader:
    """``load_model`` of the same checkpoint through transformers' class, mapped."""
    from transformers import Qwen3ForCausalLM  # noqa: F401 - which ``from_pretrained`` has before the clock starts, too

    import lading.families.hg.outline  # noqa: F401

    harness.import_lading("hg")
    from lading.models.hub import load_model

    os.environ["LADING_DATABASE_URL"] = f"sqlite:///{DATA / 'catalog.sqlite'}"
    return lambda: load_model("bench_hg", dtype="auto", mmap=True, progress=False)


def safetensors_file(clone: bool) -> Callable[[Path], Loader]:
    """``safetensors.torch.load_file``: maps; or every tensor cloned into memory of its own."""

    def prepare(folder: Path) -> Loader:
        from safetensors.torch import load_file

        def load() -> dict[str, Any]:
            state = {}
            for shard in shards(folder):
                for name, tensor in load_file(shard).items():
                    state[name] = tensor.clone() if clone else tensor
            return state

        return load

    return prepare


def transformers(dtype: str) -> Callable[[Path], Loader]:
    """``from_pretrained``, which maps the files."""

    def prepare(folder: Path) -> Loader:
        import torch
        from transformers import Qwen3ForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        return lambda: Qwen3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    return prepare


def dcp(folder: Path) -> Loader:
    """``torch.distributed.checkpoint`` with the reader for Hugging Face repositories."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors import safe_open
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    shapes: dict[str, list[int]] = {}
    for shard in shards(folder):
        with safe_open(shard, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    def load() -> dict[str, Any]:
        state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        return state

    return load


def fastsafetensors(folder: Path) -> Loader:
    """fastsafetensors without GPU direct storage."""
    from fastsafetensors import fastsafe_open

    def load() -> dict[str, Any]:
        with fastsafe_open(filenames=[str(s) for s in shards(folder)], nogds=True, device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    return load


def runai(folder: Path) -> Loader:
    """run:ai's model streamer."""
    from runai_model_streamer import SafetensorsStreamer

    def load() -> dict[str, Any]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(s) for s in shards(folder)])
            return {name: tensor.clone() for name, tensor in streamer.get_tensors()}

    return load


def fairseq2(folder: Path) -> Loader:
    """fairseq2's ``load_custom_model``, in an environment of its own."""
    import torch
    from fairseq2 import init_fairseq2
    from fairseq2.models.qwen import QwenConfig, get_qwen_model_hub

    init_fairseq2(no_progress=True)
    config = QwenConfig(
        model_dim=2048, vocab_size=65536, num_layers=16, num_attn_heads=16, num_key_value_heads=8, head_dim=128,
        qkv_proj_bias=False, q_norm=True, k_norm=True, ffn_inner_dim=6144,
    )  # fmt: skip
    return lambda: get_qwen_model_hub().load_custom_model(folder, config, dtype=torch.bfloat16)


def floor(folder: Path) -> Loader:
    """Two threads, ``preadv`` into fresh huge pages: what the machine can do without making tensors."""
    import torch  # noqa: F401 - which touches the pages afterwards

    return lambda: _raw_read(folder, threads=2, flags=os.O_RDONLY)


def direct_floor(folder: Path) -> Loader:
    """Four threads, direct I/O into fresh huge pages: what the disk can do."""
    import torch  # noqa: F401

    return lambda: _raw_read(folder, threads=4, flags=os.O_RDONLY | os.O_DIRECT)


def hashed_floor(folder: Path) -> Loader:
    """As ``floor``, but each MiB is hashed while it is in the cache: what the machine can do with BLAKE3 on the way."""
    import torch  # noqa: F401
    from blake3 import blake3

    return lambda: _raw_read(
        folder, threads=2, flags=os.O_RDONLY, step=1 << 20, look=lambda data: blake3(data).digest()
    )


def mapped_floor(folder: Path) -> Loader:
    """All bytes hashed by two threads where they are mapped: what a verified mapping costs the machine."""
    import torch  # noqa: F401
    from blake3 import blake3

    def load() -> list[mmap.mmap]:
        files = [shard.open("rb") for shard in shards(folder)]
        mappings = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) for file in files]
        pieces = [memoryview(m)[at : at + (1 << 20)] for m in mappings for at in range(0, len(m), 1 << 20)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda half: [blake3(piece).digest() for piece in half], (pieces[::2], pieces[1::2])))
        return mappings

    return load


def _raw_read(
    folder: Path, threads: int, flags: int, step: int = 8 << 20, look: Callable[[memoryview], object] | None = None
) -> list[mmap.mmap]:
    sizes = [-(-s.stat().st_size // 4096) * 4096 for s in shards(folder)]
    arena = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    arena.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(arena)
    fds = [os.open(s, flags) for s in shards(folder)]
    jobs = iter(
        [
            (fd, at, min(step, size - at), sum(sizes[:i]) + at)
            for i, (fd, size) in enumerate(zip(fds, sizes, strict=True))
            for at in range(0, size, step)
        ]
    )
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            fd, at, size, place = job
            data = view[place : place + size]
            while size:
                count = os.preadv(fd, [view[place : place + size]], at)
                if count % 4096 or count == 0:
                    break  # the end of the file
                at, place, size = at + count, place + count, size - count
            if look is not None:
                look(data)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for fd in fds:
        os.close(fd)

    return [arena]


CONTENDERS: dict[str, tuple[Callable[[Path], Loader], str | None]] = {
    "lading": (lading(dtype="auto"), None),
    "lading mmap": (lading(dtype="auto", mmap=True), None),
    "lading verified": (lading(dtype="auto", verify="always"), None),
    "lading mmap verified": (lading(dtype="auto", mmap=True, verify="always"), None),
    "lading float32": (lading(), None),
    "lading hg mmap": (lading_hg, "transformers"),
    "safetensors": (safetensors_file(clone=False), "safetensors"),
    "safetensors cloned": (safetensors_file(clone=True), "safetensors"),
    "transformers": (transformers("bfloat16"), "transformers"),
    "transformers float32": (transformers("float32"), "transformers"),
    "dcp": (dcp, "torch"),
    "fastsafetensors": (fastsafetensors, "fastsafetensors"),
    "runai": (runai, "runai_model_streamer"),
    "fairseq2": (fairseq2, "fairseq2"),
    "floor": (floor, None),
    "direct floor": (direct_floor, None),
    "hashed floor": (hashed_floor, None),
    "hashed mapped floor": (mapped_floor, None),
}
BACKED = tuple(name for name in CONTENDERS if name != "direct floor")

FOUND = (
    "lading", "lading mmap", "lading verified", "lading float32", "safetensors cloned", "transformers",
    "transformers float32", "dcp", "fastsafetensors", "runai", "fairseq2", "floor",
)  # fmt: skip
"""The contenders for which the state of memory is of interest."""

COLD = ("lading", "lading verified", "lading mmap", "transformers", "dcp", "fastsafetensors", "runai", "direct floor")
"""The contenders for which cold files are of interest; the others would only wait for the disk in the same way."""

FOUND_BARS = [
    ("own memory", "lading", "dcp", 0.65),
    ("own memory", "lading", "safetensors cloned", 0.65),
    ("float32", "lading float32", "transformers float32", 0.95),
    ("float32, aim", "lading float32", "transformers float32", 0.6),
    ("mapped", "lading mmap", "transformers", 0.5),
]
BACKED_BARS = [
    ("B1", "lading", "dcp", 0.75),
    ("B1", "lading", "fastsafetensors", 0.6),
    ("B1", "lading", "fairseq2", 0.14),
    ("B1", "lading", "floor", 1.2),
    ("B2", "lading verified", "lading", 1.6),
    ("B2", "lading verified", "dcp", 1.0),
    ("floor", "lading verified", "hashed floor", 1.2),
    ("B3", "lading mmap", "transformers", 0.5),
    ("B3", "lading mmap verified", "transformers", 2.0),
    ("floor", "lading mmap verified", "hashed mapped floor", 1.2),
    ("B4", "lading float32", "transformers float32", 0.5),
    ("hg", "lading hg mmap", "transformers", 1.0),
]
COLD_BARS = [
    ("B6", "lading", "direct floor", 1.1),
    ("B6", "lading verified", "lading", 1.15),
    ("B6", "lading", "runai", 1.0),
    ("B6", "lading", "fastsafetensors", 1.0),
]


STATES = {"found": (FOUND, FOUND_BARS), "backed": (BACKED, BACKED_BARS), "cold": (COLD, COLD_BARS)}
"""The contenders and the goals of each state."""


# --- runs ------------------------------------------------------------------------------------------------------------


def run_one(name: str, state: str) -> None:
    """Run one contender in this process, and print what was measured as JSON."""
    folder = DATA / "checkpoint"
    load = CONTENDERS[name][0](folder)

    (harness.evict if state == "cold" else harness.warm)(shards(folder))
    harness.prepare_memory(state, 5 << 30)

    print(json.dumps(harness.timed(load, touch)))


def touch(result: Any) -> None:
    """Read a byte of every page of every tensor, or of the memory that a floor filled."""
    import torch

    if isinstance(result, list):
        tensors = [torch.frombuffer(memory, dtype=torch.uint8) for memory in result]
    else:
        tensors = result.values() if isinstance(result, dict) else result.parameters()
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        local.detach().view(-1).view(torch.uint8)[::4096].sum()


def installed(name: str) -> str | None:
    """The interpreter that can run a contender; ``None`` where it is not installed."""
    module = CONTENDERS[name][1]
    if module == "fairseq2":
        return os.environ.get("FAIRSEQ2_PYTHON")
    if module is None or importlib.util.find_spec(module) is not None:
        return sys.executable

    return None


def main() -> None:
    """Run everything, print it, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--states", nargs="+", choices=list(STATES), default=list(STATES))
    parser.add_argument("--save", metavar="NAME", help="keep the figures as benchmarks/results/NAME.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--state", choices=list(STATES), help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.one:
        run_one(options.one, options.state)
        return

    folder = make_checkpoint()
    # How large the pages are that a file has in the cache, and so what mapping it costs, depends on how it came there.
    harness.evict(shards(folder))
    harness.warm(shards(folder))
    names = {name: python for name in options.only or CONTENDERS if (python := installed(name))}
    results = {
        "benchmark": "load_cpu",
        "machine": harness.machine(),
        "rounds": options.rounds,
        "load_average": os.getloadavg()[0],
    }
    for states in (("found", "backed"), ("cold",)):
        commands = {
            f"{state}: {name}": [python, __file__, "--one", name, "--state", state]
            for name, python in names.items()
            for state in states
            if state in options.states and name in STATES[state][0]
        }
        found = harness.interleave(commands, options.rounds)
        for state in (each for each in states if each in options.states):
            results[state] = harness.split(found, state)
            table, ratios = harness.table(results[state]), harness.ratios(results[state], STATES[state][1])
            print(f"\n{state}\n\n{table}\n\n{ratios}", flush=True)

    if options.save:
        harness.save(options.save, results)


if __name__ == "__main__":
    main()
