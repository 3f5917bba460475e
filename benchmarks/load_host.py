"""All ranks of one host load a checkpoint from a cold disk: each for itself, or together.

    python benchmarks/load_host.py
    python benchmarks/load_host.py --rounds 9 --only 'tp=4' 'tp=4 together'

The checkpoint is that of ``load_cpu.py``, 2.15 GB. Each run starts four processes over gloo, drops the files from the
page cache and has all ranks call ``load_model``. "total" is the time of the slowest rank; "from disk" is what all ranks
have read from it, in parts of the checkpoint; "beyond owned" the peak of memory of a rank less its parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from typing import Any

import harness
import load_cpu
import load_gangs
from harness import DATA

CATALOG = DATA / "host.sqlite"
RANKS = 4
CONTENDERS: dict[str, tuple[dict[str, int], bool]] = {
    "tp=4, each for itself": ({"tp": 4}, False),
    "tp=4, together": ({"tp": 4}, True),
    "4 replicas, each for itself": ({}, False),
    "4 replicas, together": ({}, True),
}
MOST = 1.05
"""Of the bytes of the checkpoint, what ranks that read together may bring from the disk."""
BEYOND = 64 << 20
"""Bytes that the peak of memory of a rank may have beyond what it owns."""


def run_rank(name: str) -> None:
    """Be one of the ranks; prints what it measured as JSON."""
    os.environ["LADING_DATABASE_URL"] = f"sqlite:///{CATALOG}"
    import torch

    harness.import_lading("qwen")
    from lading.gangs import create_gangs
    from lading.models.hub import load_model

    torch.set_num_threads(1)
    sizes, together = CONTENDERS[name]
    owned: list[int] = []
    with create_gangs("cpu", **sizes) as gangs:  # type: ignore[arg-type]
        gangs.root.barrier()
        if gangs.root.rank == 0:
            harness.evict(load_cpu.shards(DATA / "checkpoint"))
        gangs.root.barrier()
        harness.have_memory(2 << 30 if sizes else 3 << 30)
        gangs.root.barrier()
        figures = harness.timed(
            lambda: load_model("bench", gangs=gangs, dtype="auto", progress=False, cooperative=together),
            lambda model: owned.append(load_gangs.touch(model)),
        )
        gangs.root.barrier()
    print(json.dumps(figures | {"beyond_bytes": figures["peak_bytes"] - owned[0]}))


def run_one(name: str) -> None:
    """Start all ranks, and print as JSON what they measured together."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", name],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    found: list[dict[str, float]] = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
    most = {key: max(figures[key] for figures in found) for key in ("total_s", "peak_bytes", "beyond_bytes")}
    of_all = {key: sum(figures[key] for figures in found) for key in ("cpu_s", "disk_bytes")}
    print(json.dumps(most | of_all))


def table(found: harness.Runs) -> list[list[str]]:
    """The medians."""
    rows = [["ranks", "total s", "min–max", "CPU s of all", "MB beyond owned", "from disk, %"]]
    for name, runs in found.items():
        totals = [run["total_s"] for run in runs]
        rows.append(
            [
                name,
                f"{statistics.median(totals):.3f}",
                f"{min(totals):.3f}–{max(totals):.3f}",
                f"{harness.median(runs, 'cpu_s'):.3f}",
                f"{harness.median(runs, 'beyond_bytes') / 1e6:,.0f}",
                f"{100 * harness.median(runs, 'disk_bytes') / load_gangs.whole():.1f}",
            ]
        )

    return rows


def goals(found: harness.Runs) -> list[list[str]]:
    """What is to be reached, and what was."""
    rows = [["figure", "median", "goal: at most", ""]]
    for name, runs in found.items():
        if CONTENDERS[name][1]:
            share = harness.median(runs, "disk_bytes") / load_gangs.whole()
            verdict = "met" if share <= MOST else "missed"
            rows.append([f"of the checkpoint from disk, {name}", f"{share:.1%}", f"{MOST:.0%}", verdict])
            beyond = harness.median(runs, "beyond_bytes")
            verdict = "met" if beyond <= BEYOND else "missed"
            rows.append([f"memory beyond owned, {name}", f"{beyond / 2**20:.0f} MiB", "64 MiB", verdict])

    return rows


def main() -> None:
    """Run everything, print it, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--save", metavar="NAME", help="keep the figures as benchmarks/results/NAME.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(options.rank)
        return
    if options.one:
        run_one(options.one)
        return

    load_cpu.make_checkpoint(CATALOG)
    commands = {name: [sys.executable, __file__, "--one", name] for name in options.only or CONTENDERS}
    found = harness.interleave(commands, options.rounds)
    tables = {"cold": table(found), "cold-goals": goals(found)}
    print("\n\n".join(map(load_gangs.markdown, tables.values())))
    if options.save:
        results: dict[str, Any] = {
            "benchmark": "load_host",
            "machine": harness.machine(),
            "rounds": options.rounds,
            "load_average": os.getloadavg()[0],
            **{part: {"rows": rows} for part, rows in tables.items()},
            "cold-runs": found,
        }
        harness.save(options.save, results)


if __name__ == "__main__":
    main()
