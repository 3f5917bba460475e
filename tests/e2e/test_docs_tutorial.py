"""docs/tutorial: typed along in one empty folder, as a new user would."""

from __future__ import annotations

import os
from pathlib import Path

from tests.helpers.console_blocks import Shell, run_page
from tests.helpers.nursery import Nursery

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial" / "first-model.md").read_text(encoding="utf-8")


def test_the_page(home: Path, nursery: Nursery, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    run_page(PAGE, Shell(nursery, work, tmp_path / "bin", os.environ))
