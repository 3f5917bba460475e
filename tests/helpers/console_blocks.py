"""The console examples of a page of the documentation: commands, and what they print."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.helpers.nursery import Nursery


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
    """Return True if ``written`` is the text of the page, in which ``...`` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in re.split(r"\.\.\.\n?", expected.rstrip("\n")))

    return re.fullmatch(pattern, written.rstrip("\n"), re.DOTALL) is not None


class Shell:
    """What runs the commands of a page one by one: what one exports, the next one has.

    ``lading`` and ``python`` come from the nursery, as far as this can tell what a shell would make of the command.
    """

    def __init__(self, nursery: Nursery, folder: Path, bin_: Path, env: Mapping[str, str]) -> None:
        """:param bin_: a folder, which is made, for the programs that commands for a real shell call."""
        bin_.mkdir()
        for name, words in (("lading", "-m lading"), ("python", "")):
            (bin_ / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
            (bin_ / name).chmod(0o755)
        self._nursery = nursery
        self._folder = folder
        self._piped = bin_ / "piped"
        self._env = {**env, "PATH": f"{bin_}{os.pathsep}{env['PATH']}"}

    def run(self, command: str) -> tuple[int, str]:
        """Exit code and output."""
        command = command.replace("$PWD", str(self._folder))
        command = re.sub(r"\$\((lading [^()]+)\)", lambda found: self.run(found[1])[1].rstrip("\n"), command)
        source, pipe, sink = command.rpartition(" | ")
        words = plain_words(sink)
        own = list(itertools.takewhile(_ASSIGNMENT.match, words))
        match words[len(own) :]:
            case ["export", *names] if not pipe:
                self._env |= dict(name.split("=", 1) for name in names)
                return 0, ""
            case ["lading", *line]:
                pass
            case ["python", script, *arguments]:
                line = ["-c", _SCRIPT, script, *arguments]
            case _:
                return self._run_in_bash(command)

        self._piped.write_text(self._run_in_bash(source)[1] if pipe else "")
        env = self._env | dict(word.split("=", 1) for word in own)
        ended = self._nursery.run(line, env, cwd=self._folder, stdin=self._piped, merged=True)
        return ended.code, ended.out

    def _run_in_bash(self, command: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail\n{command}"], env=self._env, cwd=self._folder, check=False, timeout=120,
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout


_ASSIGNMENT = re.compile(r"\w+=")

_SCRIPT = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


def plain_words(command: str) -> list[str]:
    """The words of a command without anything that only a shell does, else nothing."""
    if re.search(r"[$`]", command):
        return []
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words, plain = list(lexer), shlex.split(command)
    return plain if words == plain else []


def run_page(page: str, shell: Shell) -> None:
    """Run the examples of a page, command by command, and compare what they print with what it says."""
    code = 0
    for command, expected in examples(page):
        if command == "echo $?\n":
            assert int(expected) == code != 0
            code = 0
            continue

        assert code == 0, f"the page does not say that the command before {command!r} fails with {code}"
        code, written = shell.run(command)
        assert matches(expected, written), f"$ {command}\nexpected:\n{expected}\nwritten:\n{written}"
    assert code == 0
