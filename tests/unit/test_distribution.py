"""The name of the distribution, its extras and its links, wherever a user reads them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import lading
from lading.system.version import DISTRIBUTION

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.toml")),
    *sorted(p for p in Path(lading.__file__).parent.rglob("*.py")),
]


def test_the_name_that_the_package_says_is_that_of_the_project() -> None:
    assert PROJECT["name"] == DISTRIBUTION


def test_commands_that_install_name_the_distribution_and_its_extras() -> None:
    found = []
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        found += [(path.name, name) for name in re.findall(r"pip install[^`#\n]*?(\blading\b[^\s`#]*)", text)]
        found += [(path.name, name) for name in re.findall(r"(\blading(?:-hub)?\[\w[^]]*\])", text)]
    assert ("README.md", "lading-hub[hf]") in found
    extras = PROJECT["optional-dependencies"]
    right = re.compile(rf"{DISTRIBUTION}(\[({'|'.join(extras)})\])?'?")
    assert [pair for pair in found if not right.fullmatch(pair[1])] == []


def test_the_packages_to_install_without_torch_are_all_others() -> None:
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    stated = re.search(r"^pip install (.+)\npip install --no-deps lading_hub-\*\.whl$", page, re.MULTILINE)
    assert stated is not None
    needed = [re.split(r"[<>=]", need)[0] for need in PROJECT["dependencies"]]
    assert ["torch", *stated[1].split()] == needed


def test_links_of_the_readme_work_where_it_is_shown_without_its_repository() -> None:
    """As on the page of a package index."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"(?:\]\(|^\[.+\]: )([^)\s]+)", text, re.MULTILINE)
    assert [link for link in links if not link.startswith("https://")] == []
    files = PROJECT["urls"]["Source"] + "/blob/main/"
    own = [link.removeprefix(files) for link in links if link.startswith(PROJECT["urls"]["Source"])]
    assert own
    assert [name for name in own if not (ROOT / name.partition("#")[0]).is_file()] == []


@pytest.mark.parametrize("name", ["Changelog", "Documentation"])
def test_links_of_the_project(name: str) -> None:
    assert (ROOT / PROJECT["urls"][name].removeprefix(PROJECT["urls"]["Source"] + "/blob/main/")).is_file()
