"""Comparison of values across processes: equal or not, and the paths at which they differ."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath

import torch

_MAX_SHOWN = 4
"""The most differences that a message shows."""


def digest(value: object) -> bytes:
    """Return the SHA-256 of the stable form of ``value``.

    :raises TypeError: see :func:`flatten`.
    """
    hasher = hashlib.sha256()
    for path, text in _leaves(value, ""):
        line = f"{path}={text}".encode("utf-8", "surrogatepass")
        hasher.update(len(line).to_bytes(8, "big") + line)

    return hasher.digest()


def flatten(value: object) -> dict[str, str]:
    """Return every leaf of ``value`` by its dotted path; equal values give equal results in all processes.

    :raises TypeError: ``value`` holds anything but dataclasses, mappings, sequences, sets, paths, enums, dtypes,
        devices and plain values.
    """
    return dict(_leaves(value, ""))


def differences(
    digests: Sequence[bytes], forms: Sequence[Mapping[str, str]], ranks: Sequence[int]
) -> tuple[list[int], str]:
    """Return the ranks that differ from the majority (from the first value, in a tie), and a text that lists how."""
    counts = Counter(digests)
    majority = max(counts, key=lambda d: (counts[d], -digests.index(d)))
    base = digests.index(majority)
    bad = [i for i, d in enumerate(digests) if d != majority]
    texts = []
    for i in bad:
        paths = [p for p in {**forms[base], **forms[i]} if forms[base].get(p) != forms[i].get(p)]
        shown = [
            f"{p + ' ' if p else ''}is {forms[i].get(p, 'missing')} (on rank {ranks[base]}: "
            f"{forms[base].get(p, 'missing')})"
            for p in paths[:_MAX_SHOWN]
        ]
        more = f" and {len(paths) - _MAX_SHOWN} more" if len(paths) > _MAX_SHOWN else ""
        texts.append(f"on rank {ranks[i]} {', '.join(shown)}{more}")

    return [ranks[i] for i in bad], "; ".join(texts)


def _leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        yield path, repr(value)
    elif isinstance(value, (PurePath, torch.dtype, torch.device)):
        yield path, str(value)
    elif isinstance(value, Enum):
        yield path, f"{type(value).__name__}.{value.name}"
    elif is_dataclass(value) and not isinstance(value, type):
        yield f"{path}:", type(value).__qualname__
        for f in fields(value):
            yield from _leaves(getattr(value, f.name), _join(path, f.name))
    elif isinstance(value, Mapping):
        yield f"{path}:", f"mapping of {len(value)}"
        for key in sorted(value, key=repr):
            yield from _leaves(value[key], _join(path, key) if isinstance(key, str) else f"{path}[{key!r}]")
    elif isinstance(value, AbstractSet):
        yield f"{path}:", f"set of {len(value)}"
        for i, item in enumerate(sorted(value, key=repr)):
            yield from _leaves(item, f"{path}[{i}]")
    elif isinstance(value, Sequence):
        yield f"{path}:", f"sequence of {len(value)}"
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")
    else:
        raise TypeError(f"{path or 'the value'} is of type {type(value).__name__}, which has no stable form to compare")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
