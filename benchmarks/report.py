"""Write the measured tables into the documentation.

    python benchmarks/report.py            # put the tables of benchmarks/results into docs
    python benchmarks/report.py --check    # exit 1 if they are not what docs hold

In a page, ``<!-- results: NAME found -->`` and ``<!-- end -->`` stand around a table that comes from
``benchmarks/results/NAME.json``; ``found-goals`` in place of ``found`` compares the ratios with the goals, and
``machine`` names the machine. Without such a file, the
page says that nothing was measured yet.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import harness
import load_cpu
import load_cuda
import stream

ROOT = harness.HERE.parent
PAGES = (*sorted((ROOT / "docs").rglob("*.md")), harness.HERE / "README.md", ROOT / "README.md")
BARS = {
    **{("load_cpu", state): bars for state, (_, bars) in load_cpu.STATES.items()},
    ("load_cuda", "warm"): load_cuda.BARS,
    ("load_cuda", "cold"): load_cuda.BARS[1:],
    ("stream", "streamed"): stream.BARS,
}
_BLOCK = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(results: dict[str, Any], part: str) -> str:
    """One part of a file of results as Markdown."""
    if part == "machine":
        machine = results["machine"]
        gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
        load = (
            f", beside other work (load average {results['load_average']:.0f})"
            if results.get("load_average", 0) > 1
            else ""
        )
        return (
            f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Linux {machine['kernel']}, "
            f"Python {machine['python']}, torch {machine['torch']}; medians of {results['rounds']} rounds{load}.\n"
        )
    if "rows" in results.get(part, {}):
        head, *rows = results[part]["rows"]
        lines = [head, ["---"] * len(head), *rows]
        return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)

    state, _, goals = part.partition("-")
    if goals:
        return f"{harness.ratios(results[state], BARS[results['benchmark'], state])}\n"

    return f"{harness.table(results[state])}\n"


def fill(text: str) -> str:
    """A page with its tables as the results have them."""

    def replace(match: re.Match[str]) -> str:
        file = harness.HERE / "results" / f"{match[2]}.json"
        if not file.exists():
            missing = "Not measured yet.\n" if match[3] == "machine" else ""
            return f"{match[1]}\n{missing}\n{match[4]}" if missing else f"{match[1]}{match[4]}"
        results = json.loads(file.read_text())
        return f"{match[1]}\n{render(results, match[3])}\n{match[4]}"

    return _BLOCK.sub(replace, text)


def main() -> None:
    """Fill all pages, or check them."""
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            stale.append(page)
            if "--check" not in sys.argv:
                page.write_text(filled, encoding="utf-8")

    for page in stale:
        print(Path(page).relative_to(ROOT))
    if stale and "--check" in sys.argv:
        sys.exit("These pages do not hold the measured tables: python benchmarks/report.py")


if __name__ == "__main__":
    main()
