"""The console examples of a page of the documentation: commands, and what they print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner


def examples(page: str) -> list[tuple[str, str]]:
    """Pairs (command, what it prints)."""
    found: list[tuple[str, str]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for line in block.splitlines(keepends=True):
            command, output = found[-1] if found else ("", "")
            if line.startswith("$ "):
                found.append((line[2:], ""))
            elif line.startswith("> ") and not output:
                found[-1] = (command + line[2:], "")
            else:
                found[-1] = (command, output + line)

    return found


def matches(expected: str, written: str) -> bool:
    """Whether ``written`` is what the page says, in which ``...`` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in re.split(r"\.\.\.\n?", expected.rstrip("\n")))

    return re.fullmatch(pattern, written.rstrip("\n"), re.DOTALL) is not None


def run(command: str) -> tuple[int, str]:
    """Exit code and output. Only what needs a shell gets one: a process of its own takes half a second."""
    if re.fullmatch(r"lading [^|<>$&;`]*", command):
        from lading.cli.app import app

        result = CliRunner().invoke(app, shlex.split(command)[1:])
        return result.exit_code, result.output

    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail\n{command}"],
        text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def run_page(page: str, work: Path, bin_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the examples of a page, command by command, and compare what they print with what it says.

    :param work: the folder in which they run.
    :param bin_: a folder, which is made, for the programs that they call.
    """
    monkeypatch.chdir(work)
    bin_.mkdir()
    for name, words in (("lading", "-m lading"), ("python", "")):
        (bin_ / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")

    code = 0
    for command, expected in examples(page):
        if command == "echo $?\n":
            assert int(expected) == code != 0
            code = 0
            continue

        assert code == 0, f"the page does not say that the command before {command!r} fails with {code}"
        code, written = run(command)
        assert matches(expected, written), f"$ {command}\nexpected:\n{expected}\nwritten:\n{written}"
    assert code == 0
