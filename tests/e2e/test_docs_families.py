"""The page of the families is what the catalog and the families say."""

from __future__ import annotations

from pathlib import Path

from lading import get_asset_store
from tests.helpers.families_page import PAGE, page


def test_the_page_is_up_to_date(home: Path) -> None:
    """If it is not: ``python -m tests.helpers.families_page`` writes it."""
    assert PAGE.read_text(encoding="utf-8") == page(get_asset_store())
