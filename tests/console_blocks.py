"""The console examples of a page of the documentation: commands, and what they print."""

from __future__ import annotations

import re


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
