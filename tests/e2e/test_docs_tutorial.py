"""docs/tutorial: typed along in one empty folder, as a new user would."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.console_blocks import run_page

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial" / "first-model.md").read_text(encoding="utf-8")


def test_the_page(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    run_page(PAGE, work, tmp_path / "bin", monkeypatch)
