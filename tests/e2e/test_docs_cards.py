"""docs/reference/cards.md: its files and commands, in one empty home; and whether it mentions every field."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lading.cards.card import FIELDS
from lading.cards.card_file import _ARCHITECTURE_FIELDS, _STRING_FIELDS
from tests.helpers.console_blocks import Shell, run_page
from tests.helpers.make_checkpoint import make
from tests.helpers.nursery import Nursery

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "cards.md").read_text(encoding="utf-8")


def test_the_page(home: Path, nursery: Nursery, tmp_path: Path) -> None:
    work = tmp_path / "work"
    make(work / "tiny-qwen")
    files = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(files) == PAGE.count("```yaml")
    for name, text in files:
        (work / name).write_text(text)
    run_page(PAGE, Shell(nursery, work, tmp_path / "bin", os.environ))


def test_every_field_is_described() -> None:
    cards, architectures = (
        set(re.findall(r"`([a-z0-9_]+)`", " ".join(re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE))))
        for section in (
            PAGE.partition(f"\n## The fields of {what}\n")[2].partition("\n## ")[0]
            for what in ("a card", "an architecture")
        )
    )
    assert cards == {"name", *FIELDS, *_STRING_FIELDS}
    assert architectures == set(_ARCHITECTURE_FIELDS)
