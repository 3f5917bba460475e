"""How fast one rank of gangs gets its part of a checkpoint on the CPU, beside what else there is.

    python benchmarks/load_gangs.py                          # all states
    python benchmarks/load_gangs.py --rounds 9 --only 'lading tp=4' 'safetensors tp=4'

The checkpoint is that of ``load_cpu.py``, 2.15 GB. Each run is a fresh process that is rank 0 of a world of four; the
other ranks do not exist: nothing is sent, and what is measured is what a rank does by itself. Process group, imports
and lists of shapes are had before the clock starts; the states and the rest are as in ``load_cpu.py``. "read" is what
went through system calls that read, which a mapping does without; "beyond owned" is the peak of memory less the
parameters of the rank.

- ``lading``: ``load_model`` with simulated gangs, from the catalog to the model.
- ``safetensors``: ``safe_open`` and, for each tensor, ``get_slice(…)[…].contiguous()``; no model is made.
- ``dcp``: ``torch.distributed.checkpoint`` into a dictionary of ``DTensor``, by ``HuggingFaceStorageReader``.
- ``transformers``: ``from_pretrained`` with its own plan of tensor parallelism (needs accelerate).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import load_cpu
from harness import DATA

CATALOG = DATA / "gangs.sqlite"

SIZES = {"tp=4": {"tp": 4}, "sdp=4": {"sdp": 4}, "tp=2 sdp=2": {"tp": 2, "sdp": 2}}
ROWS = ("o_proj.weight", "down_proj.weight")
"""What tensor parallelism cuts along dim 1; norms are whole on every rank."""

Loader = Callable[[], Any]


# --- contenders: each imports what it needs, and returns what is timed -----------------------------------------------


def lading(folder: Path, sizes: dict[str, int]) -> Loader:
    """``load_model`` of a rank."""
    os.environ["LADING_DATABASE_URL"] = f"sqlite:///{CATALOG}"
    harness.import_lading("qwen")
    from lading.gangs import simulate_gangs
    from lading.models.hub import load_model

    gangs = simulate_gangs(0, **sizes)

    return lambda: load_model("bench", gangs=gangs, dtype="auto", progress=False)


def safetensors(folder: Path, sizes: dict[str, int]) -> Loader:
    """Slices of all tensors."""
    import torch  # noqa: F401
    from safetensors import safe_open

    shapes = _shapes(folder)

    def load() -> dict[str, Any]:
        state = {}
        for shard in load_cpu.shards(folder):
            with safe_open(shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    rows, columns = _part(name, shapes[name], sizes)
                    cut = (rows,) if columns is None else (rows, columns)
                    state[name] = file.get_slice(name)[cut].clone()
        return state

    return load


def dcp(folder: Path, sizes: dict[str, int]) -> Loader:
    """A state of distributed tensors."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    _fake_world()
    shapes = _shapes(folder)
    tp, sdp = sizes.get("tp", 1), sizes.get("sdp", 1)
    mesh = init_device_mesh("cpu", (sdp, tp), mesh_dim_names=("sdp", "tp"))

    def load() -> dict[str, Any]:
        state = {}
        for name, shape in shapes.items():
            dim = _tp_dim(name)
            of_tp = Replicate() if tp == 1 or dim is None else Shard(dim)
            of_sdp = Replicate() if sdp == 1 else _StridedShard(0, split_factor=tp) if of_tp == Shard(0) else Shard(0)
            rows, columns = _part(name, shape, sizes)
            sizes_ = [part.stop - part.start for part in (rows, columns) if part is not None]
            local = torch.empty(sizes_, dtype=torch.bfloat16)
            strides = (shape[1], 1) if len(shape) == 2 else (1,)
            state[name] = DTensor.from_local(
                local, mesh, [of_sdp, of_tp], run_check=False, shape=torch.Size(shape), stride=strides
            )
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        return state

    return load


def transformers(folder: Path, sizes: dict[str, int]) -> Loader:
    """``from_pretrained`` with a plan."""
    import torch

    _fake_world()
    from transformers import Qwen3ForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = DistributedConfig(tp_size=sizes["tp"])

    return lambda: Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=config)


def _fake_world() -> None:
    """Be rank 0 of four; the others do not exist."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)


def _shapes(folder: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for shard in load_cpu.shards(folder):
        with safe_open(shard, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    return shapes


def _tp_dim(name: str) -> int | None:
    return None if "norm" in name else 1 if name.endswith(ROWS) else 0


def _part(name: str, shape: list[int], sizes: dict[str, int]) -> tuple[slice, slice | None]:
    """What rank 0 owns of a tensor; everything divides here."""
    ends = list(shape)
    dim = _tp_dim(name)
    if dim is not None:
        ends[dim] //= sizes.get("tp", 1)
    ends[0] //= sizes.get("sdp", 1)

    return slice(0, ends[0]), slice(0, ends[1]) if len(ends) > 1 else None


LIBRARIES = {
    "lading": lading,
    "safetensors": safetensors,
    "dcp": dcp,
    "transformers": transformers,
}
CONTENDERS = {
    f"{library} {world}": (library, world)
    for world in SIZES
    for library in LIBRARIES
    if library != "transformers" or world == "tp=4"
}
TIMES = {
    "found": [("rank", "lading tp=4", "safetensors tp=4", 0.7)],
    "backed": [
        ("B7", "lading tp=4", "safetensors tp=4", 0.7),
        ("B7", "lading tp=4", "transformers tp=4", 0.6),
        ("B7", "lading tp=4", "dcp tp=4", 0.3),
        ("B8", "lading sdp=4", "dcp sdp=4", 0.3),
    ],
    "cold": [],
}
"""Ratios of totals to reach, by state."""
BEYOND = 32 << 20
"""Bytes that the peak of memory may have beyond what a rank owns."""
SHARES = {
    "found": [],
    "backed": [("B8", "lading sdp=4", "read_bytes", 0.26)],
    "cold": [("B7", "lading tp=4", "disk_bytes", 0.46)],
}
"""Of the bytes of the checkpoint, by what was measured."""


# --- runs ------------------------------------------------------------------------------------------------------------


def run_one(name: str, state: str) -> None:
    """Run one contender in this process, and print what was measured as JSON."""
    folder = DATA / "checkpoint"
    library, world = CONTENDERS[name]
    load = LIBRARIES[library](folder, SIZES[world])

    files = load_cpu.shards(folder)
    (harness.evict if state == "cold" else harness.warm)(files)
    harness.prepare_memory(state, 2 << 30)

    before = harness.io("rchar")
    owned: list[int] = []
    figures = harness.timed(load, lambda result: owned.append(touch(result)))
    figures |= {"read_bytes": harness.io("rchar") - before, "beyond_bytes": figures["peak_bytes"] - owned[0]}
    print(json.dumps(figures))


def touch(result: Any) -> int:
    """Read a byte of every page of every tensor; returns how many bytes they have."""
    import torch

    size = 0
    for tensor in result.values() if isinstance(result, dict) else result.parameters():
        # Not through autograd, which costs a distributed tensor more than the touch does.
        local = getattr(tensor, "_local_tensor", tensor).detach()
        local.reshape(-1).view(torch.uint8)[::4096].sum()
        size += local.nbytes

    return size


def table(found: harness.Runs) -> list[list[str]]:
    """The medians, world by world."""
    rows = []
    for name, runs in sorted(found.items(), key=lambda item: harness.median(item[1], "total_s")):
        library, world = CONTENDERS[name]
        totals = [run["total_s"] for run in runs]
        rows.append(
            [
                world,
                library,
                f"{statistics.median(totals):.3f}",
                f"{min(totals):.3f}–{max(totals):.3f}",
                f"{harness.median(runs, 'cpu_s'):.3f}",
                f"{harness.median(runs, 'beyond_bytes') / 1e6:,.0f}",
                f"{100 * harness.median(runs, 'read_bytes') / whole():.1f}",
                f"{100 * harness.median(runs, 'disk_bytes') / whole():.1f}",
            ]
        )
    head = ["rank 0 of", "contender", "total s", "min–max", "CPU s", "MB beyond owned", "read, %", "from disk, %"]

    return [head, *sorted(rows, key=lambda row: list(SIZES).index(row[0]))]


def goals(found: harness.Runs, state: str) -> list[list[str]]:
    """What is to be reached, and what was."""
    rows = [["goal", "figure", "median", "goal: at most", ""]]

    def add(goal: str, what: str, figure: float, most: float, shown: str, most_shown: str) -> None:
        rows.append([goal, what, shown, most_shown, "met" if figure <= most else "missed"])

    for goal, one, other, most in TIMES[state]:
        if one in found and other in found:
            pairs = zip(found[one], found[other], strict=True)
            ratio = statistics.median(a["total_s"] / b["total_s"] for a, b in pairs)
            add(goal, f"total, {one} / {other}", ratio, most, f"{ratio:.2f}", f"{most}")
    for name, runs in found.items():
        if name.startswith("lading"):
            beyond = harness.median(runs, "beyond_bytes")
            add("B7", f"memory beyond owned, {name}", beyond, BEYOND, f"{beyond / 2**20:.0f} MiB", "32 MiB")
    for goal, name, figure, most in SHARES[state]:
        if name in found:
            share = harness.median(found[name], figure) / whole()
            what = "read" if figure == "read_bytes" else "from disk"
            add(goal, f"of the checkpoint {what}, {name}", share, most, f"{share:.1%}", f"{most:.1%}")

    return rows


def whole() -> int:
    return sum(path.stat().st_size for path in load_cpu.shards(DATA / "checkpoint"))


def markdown(rows: list[list[str]]) -> str:
    """A table."""
    head, *others = rows

    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *others])


def main() -> None:
    """Run everything, print it, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--states", nargs="+", choices=list(TIMES), default=list(TIMES))
    parser.add_argument("--save", metavar="NAME", help="keep the figures as benchmarks/results/NAME.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--state", choices=list(TIMES), help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.one:
        run_one(options.one, options.state)
        return

    load_cpu.make_checkpoint(CATALOG)
    results: dict[str, Any] = {
        "benchmark": "load_gangs",
        "machine": harness.machine(),
        "rounds": options.rounds,
        "load_average": os.getloadavg()[0],
    }
    names = [name for name in options.only or CONTENDERS if _installed(CONTENDERS[name][0])]
    for states in (("found", "backed"), ("cold",)):
        states = [state for state in states if state in options.states]
        commands = {
            f"{state}: {name}": [sys.executable, __file__, "--one", name, "--state", state]
            for name in names
            for state in states
        }
        runs = harness.interleave(commands, options.rounds)
        for state in states:
            found = harness.split(runs, state)
            tables = {state: table(found), f"{state}-goals": goals(found, state)}
            results |= {part: {"rows": rows} for part, rows in tables.items()}
            results[f"{state}-runs"] = found
            print(f"\n{state}\n\n" + "\n\n".join(map(markdown, tables.values())), flush=True)
        if options.save:
            harness.save(options.save, results)


def _installed(library: str) -> bool:
    """Whether a contender can be run; transformers places tensors only where accelerate is."""
    return library != "transformers" or importlib.util.find_spec("accelerate") is not None


if __name__ == "__main__":
    main()
