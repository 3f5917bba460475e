"""Names for cards of checkpoints that have none: made from their places, by a rule that a user can tell and repeat."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RULES = ("folder", "path")
"""The rules with a name; any other is a pattern with :data:`PLACEHOLDERS`."""

PLACEHOLDERS = ("folder", "parent", "path")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The place of a checkpoint, by the parts of its path or address."""

    parts: tuple[str, ...]
    """All parts, outermost first; the last is that of its folder, or of its file without the suffix."""
    below: int
    """The number of parts below the folder, or the hub, that the user named; at least one."""

    @property
    def folder(self) -> str:
        return self.parts[-1]

    @property
    def path(self) -> str:
        return "/".join(self.parts[-self.below :])

    def tail(self, count: int) -> str:
        """Return the last parts of the path."""
        return "/".join(self.parts[-count:])


def check_rule(rule: str) -> None:
    """Check the rule for names.

    :raises ValueError: it is a pattern with a placeholder that does not exist.
    """
    if rule in RULES:
        return
    try:
        used = [name for _, name, _, _ in string.Formatter().parse(rule) if name is not None]
        rule.format(**dict.fromkeys(PLACEHOLDERS, "x"))
        wrong = [name for name in used if name not in PLACEHOLDERS]
    except (ValueError, LookupError, AttributeError):
        wrong = [rule]
    if wrong or not rule.strip():
        known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise ValueError(f"The rule for names must be `folder`, `path`, or a pattern with {known}, but is {rule!r}")


def describe_rule(rule: str) -> str:
    """Return a sentence that tells a user how cards get their names."""
    match rule:
        case "folder":
            return "the name of the folder; where several have it, with the folders above it, as in run/checkpoint-500"
        case "path":
            return "the path below the folder that was named"
        case _:
            return f"the pattern {rule}"


def choose_names(places: Sequence[Place], rule: str, is_free: Callable[[str], bool]) -> list[str]:
    """Return a name for each place. By the rule ``folder``, all differ and are free; by others, they may not.

    :param is_free: returns whether no other checkpoint has a name.
    """
    if rule == "path":
        return [place.path for place in places]
    if rule != "folder":
        return [
            rule.format(folder=p.folder, parent=p.parts[-2] if len(p.parts) > 1 else "", path=p.path) for p in places
        ]

    names = [place.folder for place in places]
    for count in range(2, max((len(place.parts) for place in places), default=0) + 1):
        counts = Counter(names)
        clash = [i for i, name in enumerate(names) if counts[name] > 1 or not is_free(name)]
        if not clash:
            break
        for i in clash:
            names[i] = places[i].tail(count)

    return names
