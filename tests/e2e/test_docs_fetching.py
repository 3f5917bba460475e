"""The pages about sources, verification and working offline: their examples, run against a hub on loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.console_blocks import examples, matches
from tests.helpers.make_checkpoint import make
from tests.servers.hub import FakeHub

DOCS = Path(__file__).parents[2] / "docs"
CARD = re.search(
    r"^```yaml\n(.*?)^```$", (DOCS / "explanation" / "sources.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.fixture
def shell(catalog: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a shell that knows the hub, with the page's card among the user's."""
    assert CARD is not None
    work = tmp_path / "work"
    make(work / "repository", shards=2)
    (work / "repository" / "tokenizer.json").write_text("{}")
    (tmp_path / "cards.yaml").write_text(CARD[1])
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "lading").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lading "$@"\n')
    (bin_ / "lading").chmod(0o755)
    with FakeHub() as hub:
        hub.add("acme/acme-qwen", work / "repository")
        yield {
            **os.environ,
            "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
            "LADING_OFFLINE": "",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "LADING_CARDS": str(tmp_path / "cards.yaml"),
        }


@pytest.mark.parametrize("page", ["explanation/sources", "explanation/verification", "how-to/work-offline"])
def test_the_page(shell: dict[str, str], tmp_path: Path, page: str) -> None:
    blocks = examples((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    marker = "=== the next command"
    # One shell for all of them: what one exports, the next one has.
    script = "".join(
        f"{command}\ncode=$?; echo; echo '{marker}' $code\n" for command, _ in blocks if command != "echo $?\n"
    )
    done = subprocess.run(
        ["bash", "-c", script], env=shell, cwd=tmp_path, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, check=False,
    )  # fmt: skip
    answers = re.findall(rf"(.*?)\n{marker} (\d+)\n", done.stdout, re.DOTALL)

    at = -1
    for i, (command, expected) in enumerate(blocks):
        if command == "echo $?\n":
            assert int(answers[at][1]) == int(expected) != 0
            continue
        at += 1
        written, code = answers[at]
        assert matches(expected, written), f"$ {command}\nexpected:\n{expected}\nwritten:\n{written}"
        says_code = i + 1 < len(blocks) and blocks[i + 1][0] == "echo $?\n"
        assert says_code or code == "0", f"the page does not say that {command!r} fails with {code}"
