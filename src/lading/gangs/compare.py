"""Whether values of several processes are the same, and where they differ."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath

import torch

_SHOWN = 4
"""How many differences a message shows."""


def digest(value: object) -> bytes:
    """SHA-256 of the stable form of ``value``.

    :raises TypeError: see :func:`flatten`.
    """
    hasher = hashlib.sha256()
    for path, text in _leaves(value, ""):
        line = f"{path}={text}".encode("utf-8", "surrogatepass")
        hasher.update(len(line).to_bytes(8, "big") + line)

    return hasher.digest()


def flatten(value: object) -> dict[str, str]:
    """Every leaf of ``value`` by its dotted path; equal in all processes for equal values.

    :raises TypeError: it holds something else than dataclasses, mappings, sequences, sets, paths, enums, dtypes,
        devices and plain values.
    """
    return dict(_leaves(value, ""))


def differences(
    digests: Sequence[bytes], forms: Sequence[Mapping[str, str]], ranks: Sequence[int]
) -> tuple[list[int], str]:
    """The ranks that differ from the most (the first, where there are as many of each), and how they differ."""
    counts = Counter(digests)
    norm = max(counts, key=lambda d: (counts[d], -digests.index(d)))
    base = digests.index(norm)
    bad = [i for i, d in enumerate(digests) if d != norm]
    texts = []
    for i in bad:
        paths = [p for p in {**forms[base], **forms[i]} if forms[base].get(p) != forms[i].get(p)]
        shown = [
            f"{p + ' ' if p else ''}is {forms[i].get(p, 'missing')} (on rank {ranks[base]}: "
            f"{forms[base].get(p, 'missing')})"
            for p in paths[:_SHOWN]
        ]
        more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
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
