"""The pages about sources, verification and working offline: their examples, run against a hub on loopback."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.console_blocks import Shell, run_page
from tests.helpers.make_checkpoint import make
from tests.helpers.nursery import Nursery
from tests.servers.hub import FakeHub

DOCS = Path(__file__).parents[2] / "docs"
CARD = re.search(
    r"^```yaml\n(.*?)^```$", (DOCS / "explanation" / "sources.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.fixture
def environment(catalog: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a shell that knows the hub, with the page's card among the user's."""
    assert CARD is not None
    work = tmp_path / "work"
    make(work / "repository", shards=2)
    (work / "repository" / "tokenizer.json").write_text("{}")
    (tmp_path / "cards.yaml").write_text(CARD[1])
    with FakeHub() as hub:
        hub.add("acme/acme-qwen", work / "repository")
        yield {
            **os.environ,
            "LADING_OFFLINE": "",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "LADING_CARDS": str(tmp_path / "cards.yaml"),
        }


@pytest.mark.parametrize(
    "page", ["explanation/sources", "explanation/verification", "how-to/stream-a-model", "how-to/work-offline"]
)
def test_the_page(nursery: Nursery, environment: dict[str, str], tmp_path: Path, page: str) -> None:
    shell = Shell(nursery, tmp_path, tmp_path / "bin", environment)
    run_page((DOCS / f"{page}.md").read_text(encoding="utf-8"), shell)
