"""What the benchmarks share: fresh processes that take turns, medians, tables, results with the machine named."""

from __future__ import annotations

import gc
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("LADING_BENCH_DATA", HERE / ".data"))

Runs = dict[str, list[dict[str, float]]]
"""Figures of each run, by contender."""

Bar = tuple[str, str, str, float]
"""(name, contender, other contender, the ratio of totals to reach)."""


def import_lading(family: str) -> None:
    """Import what the first load of a process imports, as the peers import theirs before the clock starts."""
    import lading.formats.local
    import lading.models.hub
    import lading.models.parallelize
    import lading.models.placements
    import lading.seeds
    import lading.transfer.exchange  # noqa: F401
    from lading.models.family import get_family

    get_family(family).model_kls  # noqa: B018 (a family imports its module on the first use)


def make_catalog(path: Path, *commands: list[str]) -> None:
    """Make a new catalog at ``path`` by commands of the CLI."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    environment = os.environ | {"LADING_DATABASE_URL": f"sqlite:///{path}"}
    for command in commands:
        subprocess.run([sys.executable, "-m", "lading", *command], check=True, env=environment, capture_output=True)


def evict(files: Sequence[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def warm(files: Sequence[Path]) -> None:
    """Read files into the page cache."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(8 << 20):
                pass


REST = 3.0
"""Seconds after which a host that takes back free memory has done so."""


def have_memory(size: int) -> None:
    """Touch and free ``size`` bytes, so that the host of a virtual machine backs them when the clock starts."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, size, 4096):
        memory[at] = 1
    memory.close()


def prepare_memory(state: str, size: int) -> None:
    """Bring memory into a state: ``found``, after a rest without any touch, or ``backed``, ``size`` bytes."""
    if state == "found":
        time.sleep(REST)
    else:
        have_memory(size)  # last, as what has been free for a second may be gone again


def split(found: Runs, state: str) -> Runs:
    """Return the runs of one state of memory, by contender."""
    return {name.partition(": ")[2]: runs for name, runs in found.items() if name.startswith(f"{state}: ")}


def timed(load: Callable[[], Any], touch: Callable[[Any], None]) -> dict[str, float]:
    """Run ``load`` once: seconds, those of all cores, peak memory beyond the level before, bytes from the disk."""
    # What the imports have left behind is due to be collected, which takes 0.1 s of whoever happens to be next.
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, io_before = status("VmRSS"), io("read_bytes")

    start, cpu = time.perf_counter(), time.process_time()
    result = load()
    loaded = time.perf_counter() - start
    touch(result)
    total = time.perf_counter() - start

    return {
        "load_s": loaded,
        "total_s": total,
        "cpu_s": time.process_time() - cpu,
        "peak_bytes": status("VmHWM") - before,
        "disk_bytes": io("read_bytes") - io_before,
    }


def status(key: str) -> int:
    """A figure of ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def io(key: str) -> int:
    """A figure of ``/proc/self/io``, in bytes."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def interleave(commands: dict[str, list[str]], rounds: int) -> Runs:
    """Run each command in turn, ``rounds`` times; each prints its figures as JSON in its last line."""
    found: Runs = {name: [] for name in commands}
    for n in range(rounds):
        for name, command in commands.items():
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {n + 1}: {name}: {found[name][-1]['total_s']:.3f} s", file=sys.stderr)

    return found


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}

    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        **gpu,
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def median(runs: list[dict[str, float]], key: str) -> float:
    """The median of one figure."""
    return statistics.median(run[key] for run in runs)


def table(found: Runs) -> str:
    """The medians as Markdown."""
    rows = ["| contender | total s | min–max | peak MB beyond start | MB from disk |", "|---|---|---|---|---|"]
    for name, runs in sorted(found.items(), key=lambda item: median(item[1], "total_s")):
        totals = [run["total_s"] for run in runs]
        rows.append(
            f"| {name} | {statistics.median(totals):.3f} | {min(totals):.3f}–{max(totals):.3f} "
            f"| {median(runs, 'peak_bytes') / 1e6:,.0f} | {median(runs, 'disk_bytes') / 1e6:,.0f} |"
        )

    return "\n".join(rows)


def ratios(found: Runs, bars: Sequence[Bar]) -> str:
    """The ratios that there are goals for, as Markdown: the median of the ratios of each round."""
    rows = ["| goal | ratio of totals | median | goal: at most | |", "|---|---|---|---|---|"]
    for name, one, other, goal in bars:
        if one in found and other in found:
            pairs = zip(found[one], found[other], strict=True)
            ratio = statistics.median(a["total_s"] / b["total_s"] for a, b in pairs)
            rows.append(f"| {name} | {one} / {other} | {ratio:.2f} | {goal} | {'met' if ratio <= goal else 'missed'} |")

    return "\n".join(rows)


def save(name: str, results: dict[str, Any]) -> None:
    """Keep figures as ``results/NAME.json``."""
    target = HERE / "results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
