"""The state dict in a checkpoint that holds other things, too: an optimizer, averaged weights, a second model.

Training scripts save nested dicts, ``{"model": {…}, "optimizer": {…}}``, and the tensors of a model are those directly
in one of them. A dotted path names it, ``ema.module``; without one it is the dict under the first of
:data:`STATE_KEYS` that contains a tensor, else the checkpoint itself, if it contains one or is empty.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import NoReturn

from lading.errors import CheckpointNotFoundError
from lading.formats.files import corrupt
from lading.formats.safetensors import MAX_NAME_SIZE
from lading.system.display import counted

STATE_KEYS = ("model", "state_dict", "model_state_dict")
"""The keys under which fairseq, fairseq2, PyTorch Lightning and many training scripts save the state dict."""

_MAX_VISITS = 10_000
"""The most values among which an error searches for state dicts; an optimizer has a dict for each parameter."""

_MAX_KEY = 80
"""The most characters of a key that it lists."""

_MAX_SHOWN = 8


def find_state_dict(
    value: object,
    path: str | None,
    *,
    label: str,
    is_tensor: Callable[[object], bool],
    describe: Callable[[object], str],
) -> Mapping[str, object]:
    """Return the dict of a checkpoint that contains the tensors of the model.

    :param value: the content of the checkpoint.
    :param path: the dotted path of the dict; a key may contain dots.
    :param label: the path of the file, for the error.
    :param is_tensor: tells a tensor from other values.
    :param describe: describes a value of another type for the error.

    :raises CheckpointNotFoundError: nothing is at ``path``, or no dict that contains a tensor.
    :raises CorruptModelCheckpointError: the checkpoint contains no state dict, or several of other names.
    """

    def holds_tensors(value: object) -> bool:
        return type(value) is dict and any(map(is_tensor, value.values()))

    if path is not None:
        found = _at(value, path.split("."))
        for each in found:
            if type(each) is dict and holds_tensors(each):
                return each
        what = "nothing" if not found else "a dict without tensors" if type(found[0]) is dict else describe(found[0])
        nested = _named(value, holds_tensors) or "It holds no nested state dict."
        raise CheckpointNotFoundError(label, f"{label}: expected a state dict at {path!r}, found {what}. {nested}")
    if type(value) is not dict:
        _refuse(label, describe(value))

    for key in STATE_KEYS:
        inner = value.get(key)
        if type(inner) is dict and holds_tensors(inner):
            return inner
    if value and not holds_tensors(value):
        keys = ", ".join(repr(key[:40]) for key in list(value)[:_MAX_SHOWN] if type(key) is str)
        more = " …" if len(value) > _MAX_SHOWN else ""
        _refuse(label, f"a dict with the keys {keys}{more} and no tensor", hint=_named(value, holds_tensors))

    return value


def require_name(name: str, *, label: str) -> None:
    """Check the name of a tensor.

    :raises CorruptModelCheckpointError: it is not UTF-8, or too long.
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = -1
    if not 0 <= size <= MAX_NAME_SIZE:
        where = f"tensor {name[:80]!r}"
        raise corrupt(label, where, expected=f"a name of at most {MAX_NAME_SIZE} bytes", found=f"{size}")


def _at(value: object, parts: Sequence[str]) -> list[object]:
    """Return the values at a path: several, if its keys contain dots."""
    # What some of the parts lead to, by their number: each value once, however many ways lead to it.
    reached: list[dict[int, object]] = [{} for _ in range(len(parts) + 1)]
    reached[0][id(value)] = value
    for first, values in enumerate(reached):
        for each in values.values():
            for end in range(first + 1, len(parts) + 1) if type(each) is dict else ():
                key = ".".join(parts[first:end])
                if type(each) is dict and key in each:
                    reached[end][id(each[key])] = each[key]

    return list(reached[-1].values())


def _named(value: object, holds_tensors: Callable[[object], bool]) -> str:
    """Return advice that lists the nested dicts with tensors; an empty string if there are none."""
    found: list[str] = []
    waiting, known = deque([("", value)]), dict[int, bool]()
    for _ in range(_MAX_VISITS):
        if not waiting:
            break
        path, each = waiting.popleft()
        if type(each) is not dict:
            continue
        seen = id(each) in known
        # A checkpoint may hold one dict under several names, or within itself.
        if known.setdefault(id(each), False) or (not seen and path and holds_tensors(each)):
            known[id(each)] = True
            found.append(path)
        if seen or known[id(each)]:
            continue
        inner = ((f"{path}.{key}" if path else key, item) for key, item in each.items() if len(key) <= _MAX_KEY)
        waiting.extend(islice(inner, max(0, _MAX_VISITS - len(waiting))))
    if not found:
        return ""

    shown = ", ".join(map(repr, found[:_MAX_SHOWN]))
    more = f" and {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN else ""

    return (
        f"It holds {counted(len(found), 'nested state dict')}: {shown}{more}. Name one behind the path, as in "
        "`checkpoint.pt/NAME` (in a card: `state_dict`)."
    )


def _refuse(label: str, found: str, *, hint: str = "") -> NoReturn:
    raise corrupt(
        label,
        "",
        expected=f"a state dict, or a dict that holds one as {', '.join(map(repr, STATE_KEYS))}",
        found=found,
        hint=hint or "Save `model.state_dict()`.",
    )
