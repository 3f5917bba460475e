"""docs/reference/cli.md, command by command, in one empty home; and whether it mentions everything."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click
import pytest

from tests.helpers.console_blocks import Shell, examples, matches, run_page
from tests.helpers.make_checkpoint import make
from tests.helpers.nursery import Nursery

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")


def test_the_page(home: Path, nursery: Nursery, tmp_path: Path) -> None:
    work = tmp_path / "work"
    make(work / "tiny-qwen")
    run_page(PAGE, Shell(nursery, work, tmp_path / "bin", os.environ))


def test_the_matcher() -> None:
    assert matches("a ... c\n", "a b c\n")
    assert matches("a\n...\nc\n", "a\nb\nb\nc\n")
    assert not matches("a\n", "a\nb\n")
    assert not matches("a.c\n", "abc\n")


def commands(group: click.Group, words: tuple[str, ...]) -> list[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    found = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found += commands(command, (*words, name))
        else:
            found.append(((*words, name), command))

    return found


def all_commands() -> list[tuple[tuple[str, ...], click.Command]]:
    from lading.cli.app import app

    return commands(app, ("lading",))


SHARED = {"--every", "-n", "--dry-run", "--json", "--nl", "--csv", "-q", "--quiet", "-v", "--verbose", "--debug"}


@pytest.mark.parametrize(
    ("words", "command"), all_commands(), ids=lambda v: " ".join(v) if isinstance(v, tuple) else ""
)
def test_every_option_is_described(words: tuple[str, ...], command: click.Command) -> None:
    section = PAGE.partition(f"\n## {' '.join(words)}\n")[2].partition("\n## ")[0]
    assert "```console" in section, f"docs/reference/cli.md has no example of {' '.join(words)}"
    for parameter in command.params:
        for option in parameter.opts if isinstance(parameter, click.Option) else ():
            assert option in SHARED or f"`{option}`" in section or f"[{option}" in section or f" {option} " in section


def test_every_code_is_described_and_shown() -> None:
    from lading import errors

    codes = {kls.exit_code for kls in vars(errors).values() if isinstance(kls, type) and hasattr(kls, "exit_code")}
    described = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    assert codes | {0, 130, 141} <= described
    shown = {int(output) for command, output in examples(PAGE) if command == "echo $?\n"}
    assert shown >= {2, 3, 4, 5, 6, 7}
