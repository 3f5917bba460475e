"""The pickles inside of torch's checkpoints, read as data: nothing that they name is ever imported or called.

A pickle is a program for a small machine, and one of its instructions calls any function of any module. The usual way
to read one safely is to run that machine and to refuse some names. Here there is no machine that could call anything:
this reader knows the few functions that state dicts are made with by their *names* (:mod:`.pickle_calls`), and has
values of its own for what they would return (:mod:`.pickle_values`). A tensor becomes one that says where its bytes
are; all other names are refused, or become a value that does nothing, which is all that ``restrict=False`` changes.

Source: the opcodes as described in CPython's ``pickletools``, and what ``torch.save`` writes, of torch 1.0 to 2.13.
What no version of these writes (the text opcodes of protocol 0, the extension registry, ``DUP``) is refused as damage.

All of it is linear in the size of the pickle, and nothing recurses: not the reader, and not whoever looks at the
result, since a dict keeps what has a string for its key only, and is never hashed or compared.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from lading.errors import CorruptModelCheckpointError, RefusedPickleError
from lading.formats.files import corrupt
from lading.formats.torch_save.pickle_calls import ArgumentError, call, is_known, is_size, num_copied, storage_dtype
from lading.formats.torch_save.pickle_values import ITEM_SIZES, Global, Inert, Storage, describe

MAX_PICKLE_SIZE = 100_000_000
"""Bytes; the limit that the header of a safetensors file has, too."""

MAX_OBJECTS = 4_000_000
"""Lists, dicts, tuples and the like that a pickle makes, and values that it keeps: a state dict of 100,000 tensors has
fewer than a million of each. One takes 70 bytes of memory for one of the pickle: 100 MB took 7 GB."""

_MAX_INT_SIZE = 16
"""Bytes of an integer that is kept; nothing in a tensor needs more than 8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pickle:
    """What a pickle holds."""

    value: object
    size: int
    """Bytes that it took."""
    storages: Mapping[str, Storage]
    """All that it names, by their keys, also those of tensors that are not in ``value``."""


def read_pickle(stream: BinaryIO, *, label: str, where: str, restrict: bool, limit: int = MAX_PICKLE_SIZE) -> Pickle:
    """The pickle that begins where ``stream`` stands, which then stands behind it.

    Its value is made of ``dict``, ``list``, ``tuple``, ``str``, ``bytes``, ``int``, ``float``, ``bool`` and ``None``,
    and of those of :mod:`.pickle_values`. It may be nested as deeply as the pickle is long, and may contain itself.

    :param label: the path or the address of the file, for the error.
    :param where: the part of the file, for the error.
    :param restrict: refuse whatever names something that a state dict does not need.
    :param limit: bytes that are read at most.

    :raises CorruptModelCheckpointError: it is no pickle, or not one of those that torch writes.
    :raises RefusedPickleError: it would import something else, and ``restrict`` is set.
    :raises OSError: the stream cannot be read.
    """
    machine = _Machine(stream, label, where, restrict, limit)

    value = machine.run()

    return Pickle(value=value, size=machine.taken, storages=machine.storages)


class _Machine:
    """A stack, a memo, and instructions that move values between them."""

    def __init__(self, stream: BinaryIO, label: str, where: str, restrict: bool, limit: int) -> None:
        self._stream = stream
        self._label = label
        self._where = where
        self._restrict = restrict
        self._limit = limit
        self.taken = 0
        self._stack: list[object] = []
        self._marked: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self._copied = 0
        self._made = 0
        self.storages: dict[str, Storage] = {}

    def run(self) -> object:
        while True:
            code = self._take(1)[0]
            if code == 0x2E:  # STOP
                break
            step = _STEPS.get(code)
            if step is None:
                raise self._fail("an instruction of a pickle that torch writes", f"the byte {code:#04x}")
            if code in _MAKERS:
                self._made += 1
                if self._made > MAX_OBJECTS:
                    raise self._fail(f"at most {MAX_OBJECTS} lists, dicts and tuples", "more")
            step(self)

        value = self._pop()
        if self._stack or self._marked:
            raise self._fail("one value", "more")

        return value

    # --- reading ---

    def _fail(self, expected: str, found: str) -> CorruptModelCheckpointError:
        return corrupt(self._label, f"{self._where}, byte {self.taken}", expected=expected, found=found)

    def _take(self, size: int) -> bytes:
        if size > self._limit - self.taken:
            raise self._fail(f"at most {self._limit} bytes", f"{size} more at {self.taken}")
        data = self._stream.read(size)
        self.taken += len(data)
        if len(data) != size:
            raise self._fail(f"{size} bytes", f"{len(data)}, and the end of it")

        return data

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _line(self) -> str:
        data = self._stream.readline(min(512, self._limit - self.taken))
        self.taken += len(data)
        if not data.endswith(b"\n"):
            raise self._fail("a name of at most 512 bytes and the end of its line", repr(data[:80]))

        return self._text(data[:-1])

    def _text(self, data: bytes) -> str:
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self._fail("text in UTF-8", repr(data[:80])) from None

    # --- the stack ---

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        if not self._stack:
            raise self._fail("a value on the stack", "none")

        return self._stack.pop()

    def _top(self) -> object:
        if not self._stack:
            raise self._fail("a value on the stack", "none")

        return self._stack[-1]

    def _pop_mark(self) -> list[object]:
        if not self._marked:
            raise self._fail("a mark on the stack", "none")
        values, self._stack = self._stack, self._marked.pop()

        return values

    # --- instructions ---

    def _proto(self) -> None:
        version = self._number(1)
        if self.taken != 2 or not 2 <= version <= 5:
            raise self._fail("one protocol, of 2 to 5, at the beginning", f"{version}")

    def _frame(self) -> None:
        self._take(8)  # it only tells how much to read at once

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _drop(self) -> None:
        self._pop()

    def _drop_marked(self) -> None:
        self._pop_mark()

    def _frozen_set(self) -> None:
        self._pop_mark()
        self._push(Inert("a set"))

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise self._fail(f"{count} values on the stack", f"{len(self._stack)}")
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._push(values)

    def _append(self, values: list[object]) -> None:
        target = self._top()
        if type(target) is list:
            target += values
        elif not isinstance(target, Inert):
            raise self._fail("a list to append to", describe(target))

    def _set(self, values: list[object]) -> None:
        if len(values) % 2:
            raise self._fail("pairs of keys and values", f"{len(values)} of both")
        target = self._top()
        if type(target) is dict:
            # Other keys cannot name a tensor, and the hash of a nested one could be made to take any time.
            target.update((k, v) for k, v in zip(values[::2], values[1::2], strict=True) if type(k) is str)
        elif not isinstance(target, Inert):
            raise self._fail("a dict to set items of", describe(target))

    def _pop_pair(self) -> list[object]:
        value, key = self._pop(), self._pop()

        return [key, value]

    def _long(self, size: int) -> None:
        data = self._take(size)
        self._push(
            int.from_bytes(data, "little", signed=True) if size <= _MAX_INT_SIZE else Inert(f"a number of {size} bytes")
        )

    def _float(self) -> None:
        (value,) = struct.unpack(">d", self._take(8))
        self._push(value)

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise self._fail(f"a value that was kept as {index}", "none")
        self._push(self._memo[index])

    def _put(self, index: int) -> None:
        if len(self._memo) >= MAX_OBJECTS:
            raise self._fail(f"at most {MAX_OBJECTS} values that are kept", "more")
        self._memo[index] = self._top()

    def _global(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise self._fail("the names of a module and of something in it", f"{describe(module)} and {describe(name)}")
        named = Global(module, name)
        if self._restrict and not is_known(named):
            shown = repr(str(named)[:200])
            raise RefusedPickleError(
                self._label,
                f"{self._label}: {self._where}: expected a state dict, which holds tensors and plain values only, "
                f"found {shown}, which to unpickle would import and may run code. Save `model.state_dict()` instead, "
                "or read the tensors alone with `--no-restrict` (in Python: `restrict=False`): lading then passes over "
                "such objects, and imports nothing that they name.",
            )
        self._push(named)

    def _reduce(self) -> None:
        args, function = self._pop(), self._pop()
        if type(args) is not tuple:
            raise self._fail("the arguments of a call", describe(args))
        if type(function) is not Global:
            # An inert value came from a name that was let pass, and what it would return is no better.
            if not isinstance(function, Inert):
                raise self._fail("the name of a function to call", describe(function))
            self._push(function)
            return

        self._push(self._call(function, args))

    def _call(self, function: Global, args: tuple[object, ...]) -> object:
        # What is kept takes two bytes to ask for again, whatever its length: no copy of a copy of a copy.
        self._copied += num_copied(function, args)
        if self._copied > self.taken:
            raise self._fail("no more items than the pickle has bytes", f"{self._copied}, by copies of copies")
        try:
            return call(function, args)
        except ArgumentError as error:
            raise self._fail(f"arguments of {function} that {error.expected}", error.found) from None

    def _new(self, keywords: bool) -> None:
        if keywords:
            self._pop()
        args, kls = self._pop(), self._pop()
        if type(args) is not tuple or not isinstance(kls, (Global, Inert)):
            raise self._fail("a class and its arguments", f"{describe(kls)} and {describe(args)}")
        # `OrderedDict` comes this way when a subclass of it would.
        self._push(self._call(kls, args) if type(kls) is Global else kls)

    def _build(self) -> None:
        # The attributes of an object: hooks, versions of modules. None of them is a tensor of the state dict.
        self._pop()
        if isinstance(target := self._top(), (Global, str, int, float, type(None))):
            raise self._fail("an object to set attributes of", describe(target))

    def _persistent(self) -> None:
        self._push(self._storage(self._pop()))

    def _storage(self, pid: object) -> object:
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise self._fail("('storage', type, key, location, size)", describe(pid))
        _, kind, key, location, size, *view = pid
        dtype = storage_dtype(kind) if type(kind) is Global else ""
        known = dtype != "" and type(key) is str and type(location) is str and is_size(size)
        # Before torch 0.4, a storage could be a part of another one.
        if not known or any(part is not None for part in view):
            raise self._fail("a storage with its key, location and size", ", ".join(map(describe, pid[1:])))

        storage = Storage(key, dtype, size * (ITEM_SIZES[dtype] if dtype else 1))
        self.storages[key] = storage

        return storage


# --- opcodes ----------------------------------------------------------------------------------------------------------

_M = _Machine

_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x80: _M._proto,
    0x95: _M._frame,
    ord("("): _M._mark,
    ord("0"): _M._drop,
    ord("1"): _M._drop_marked,
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    ord("J"): lambda m: m._long(4),
    ord("K"): lambda m: m._push(m._number(1)),
    ord("M"): lambda m: m._push(m._number(2)),
    0x8A: lambda m: m._long(m._number(1)),
    0x8B: lambda m: m._long(m._number(4)),
    ord("G"): _M._float,
    ord("X"): lambda m: m._push(m._text(m._take(m._number(4)))),
    0x8C: lambda m: m._push(m._text(m._take(m._number(1)))),
    0x8D: lambda m: m._push(m._text(m._take(m._number(8)))),
    ord("U"): lambda m: m._push(m._take(m._number(1)).decode("latin-1")),
    ord("T"): lambda m: m._push(m._take(m._number(4)).decode("latin-1")),
    ord("B"): lambda m: m._push(m._take(m._number(4))),
    ord("C"): lambda m: m._push(m._take(m._number(1))),
    0x8E: lambda m: m._push(m._take(m._number(8))),
    0x96: lambda m: m._push(m._take(m._number(8))),
    ord(")"): lambda m: m._push(()),
    ord("]"): lambda m: m._push([]),
    ord("}"): lambda m: m._push({}),
    0x8F: lambda m: m._push(Inert("a set")),
    0x85: lambda m: m._tuple(1),
    0x86: lambda m: m._tuple(2),
    0x87: lambda m: m._tuple(3),
    ord("t"): lambda m: m._push(tuple(m._pop_mark())),
    ord("l"): lambda m: m._push(m._pop_mark()),
    0x91: _M._frozen_set,
    ord("a"): lambda m: m._append([m._pop()]),
    ord("e"): lambda m: m._append(m._pop_mark()),
    0x90: lambda m: m._append(m._pop_mark()),
    ord("s"): lambda m: m._set(m._pop_pair()),
    ord("u"): lambda m: m._set(m._pop_mark()),
    ord("h"): lambda m: m._get(m._number(1)),
    ord("j"): lambda m: m._get(m._number(4)),
    ord("q"): lambda m: m._put(m._number(1)),
    ord("r"): lambda m: m._put(m._number(4)),
    0x94: lambda m: m._put(len(m._memo)),
    ord("c"): lambda m: m._global(m._line(), m._line()),
    0x93: lambda m: m._global(*m._pop_pair()),
    ord("R"): _M._reduce,
    0x81: lambda m: m._new(keywords=False),
    0x92: lambda m: m._new(keywords=True),
    ord("b"): _M._build,
    ord("Q"): _M._persistent,
}

_MAKERS = frozenset(b"(]}tlRQ\x81\x85\x86\x87\x8f\x91\x92\x93c")
"""Instructions that make an object of more than a few bytes."""
