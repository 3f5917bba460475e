"""The page on the Python API: its examples are one program, and its tables name all that is public."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import lading

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "python.md").read_text(encoding="utf-8")


def test_the_examples(home: Path, tmp_path: Path) -> None:
    program = "".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "mistral" in done.stdout
    assert "qwen3_0.6b" in done.stdout


def test_all_that_is_public_is_named() -> None:
    named = set(re.findall(r"`([A-Za-z_]+)`", PAGE[PAGE.index("## When something is wrong") :]))
    reports = {name for name in lading.__all__ if name.endswith(("Report", "Plan", "Usage"))}
    missing = set(lading.__all__) - named - reports - {"__version__"}

    assert not missing
