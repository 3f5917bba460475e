"""The page on the Python API: its examples are one program, and its tables name all that is public."""

from __future__ import annotations

import os
import re
from pathlib import Path

import lading
from tests.helpers.nursery import Nursery

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "python.md").read_text(encoding="utf-8")


def test_the_examples(home: Path, nursery: Nursery, tmp_path: Path) -> None:
    program = "".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    done = nursery.run(["-c", program], os.environ, cwd=tmp_path)

    assert done.code == 0, done.err
    assert "mistral" in done.out
    assert "qwen3_0.6b" in done.out


def test_all_that_is_public_is_named() -> None:
    named = set(re.findall(r"`([A-Za-z_]+)`", PAGE[PAGE.index("## Errors") :]))
    reports = {name for name in lading.__all__ if name.endswith(("Report", "Plan", "Usage"))}
    missing = set(lading.__all__) - named - reports - {"__version__"}

    assert not missing
