"""Every error that lading raises on purpose.

::

    LadingError                                       exit code of the CLI
    ├── AssetNotFoundError                            2  no card of that name
    │   └── ModelNotKnownError                        2  no model of that name: no card, path or repository
    ├── ModelArchitectureNotKnownError                2
    ├── ModelFamilyNotKnownError                      2
    ├── NotSupportedError                             2  a valid request that lading does not support
    │   └── TorchNotFoundError                        8  torch is not installed, and this needs it
    ├── SettingsError                                 2  an environment variable with an invalid value
    ├── QueryError                                    2  SQL that the database does not understand
    ├── AssetCardError                                3  an invalid card, or one whose family is not registered
    │   ├── CardFileError                             3  invalid card files; lists every problem (`.problems`)
    │   └── ModelConfigError                          3  values that do not fit together; also a ValueError
    ├── ModelCheckpointError                          4
    │   ├── CheckpointNotFoundError                   2  also a FileNotFoundError
    │   ├── CorruptModelCheckpointError               4  the file breaks the rules of its format
    │   ├── ModelCheckpointMismatchError              4  an intact file that does not fit the model (`.problems`)
    │   └── DigestMismatchError                       4  the bytes differ from the published ones
    ├── FetchError                                    5  network
    │   └── AddressError                              2  not a valid address; in a card, an AssetCardError
    ├── CatalogError                                  6
    │   └── CatalogOutdatedError                      6  run `lading db upgrade`
    ├── PolicyError                                   7  possible, but refused
    │   ├── ModelGatedError                           7
    │   └── RefusedPickleError                        7  a file that could run code; also a ModelCheckpointError
    ├── GangError                                     8  another rank failed, or cannot be reached
    └── InternalError                                 1  a bug in lading or in the code of a family

A wrong argument raises a plain ``ValueError`` or ``TypeError``, as everywhere in Python.

Errors travel between ranks, so each one pickles with all of its attributes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar, Self


class LadingError(Exception):
    """The base class of lading's errors."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """The message: what was expected, what was found, where, and how to fix it.

        Characters that a terminal does not print as they are, such as control characters in a tensor's name, are
        escaped; line breaks stay.
        """
        return escaped(str(self.args[0]), keep="\n")

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        # The default calls the constructor with `args`, which holds only the message.
        return _restore, (type(self), self.args, self.__dict__.copy())


def escaped(text: str, *, keep: str = "") -> str:
    """Return ``text`` with line breaks, terminal controls and other unprintable characters escaped.

    :param keep: characters that are not escaped.
    """
    if text.isprintable():
        return text

    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def first_line(error: LadingError | OSError) -> str:
    """Return the first line of what is wrong, for a list of several."""
    if isinstance(error, LadingError):
        return error.message.partition("\n")[0]

    return f"{os.strerror(error.errno or 0)}: {error.filename}"


def _restore(kls: type[LadingError], args: tuple[object, ...], state: dict[str, object]) -> LadingError:
    error = kls.__new__(kls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that suggests the names closest to ``name``, with a leading space; empty without one."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.6)

    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


# --- names -----------------------------------------------------------------------------------------------------------


class AssetNotFoundError(LadingError):
    """A card name that is not in the catalog."""

    exit_code = 2

    def __init__(self, name: str, hint: str = "") -> None:
        super().__init__(f"No card named {name!r} is in the catalog.{hint or ' `lading list --all` shows them.'}")
        self.name = name
        self.hint = hint


class ModelNotKnownError(AssetNotFoundError):
    """A model name that is not in the catalog, nor that of a path or of a repository of the hub."""

    def __init__(self, name: str, hint: str = "") -> None:
        LadingError.__init__(self, f"No model named {name!r} is in the catalog.{hint or ' `lading list` shows them.'}")
        self.name = name
        self.hint = hint


class ModelArchitectureNotKnownError(LadingError):
    """An architecture name that the family does not have."""

    exit_code = 2

    def __init__(self, arch: str, family: str | None = None, hint: str = "") -> None:
        """Make the error.

        :param family: the family; an error without it is deprecated, as in fairseq2.
        """
        if family is None:
            warnings.warn(
                "`ModelArchitectureNotKnownError` without `family` is deprecated: pass the name of the family.",
                DeprecationWarning,
                stacklevel=2,
            )
        of = "" if family is None else f" of the {family} family"
        super().__init__(f"{arch!r} is not a known architecture{of}.{hint or ' `lading archs` shows them.'}")
        self.arch = arch
        self.family = family


class ModelFamilyNotKnownError(LadingError):
    """A family name that no installed package registers."""

    exit_code = 2

    def __init__(self, name: str, hint: str = "") -> None:
        super().__init__(
            f"No installed package registers a model family named {name!r} (entry point group `lading.families`)."
            f"{hint or ' `lading families` shows the registered ones.'}"
        )
        self.name = name


class NotSupportedError(LadingError):
    """A valid request that lading, or the family, does not support."""

    exit_code = 2


class TorchNotFoundError(NotSupportedError):
    """Something that needs torch, which is not installed or cannot be imported."""

    exit_code = 8

    @classmethod
    def of(cls, what: str, error: ImportError) -> Self:
        """Return the error for ``what`` needs torch, from the error of its import."""
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported: {error}"

        return cls(f"{what} needs torch, which {why}. Run `pip install torch`.")


class SettingsError(LadingError):
    """An environment variable with an invalid value."""

    exit_code = 2


class QueryError(LadingError):
    """SQL that the database rejects."""

    exit_code = 2


# --- cards -----------------------------------------------------------------------------------------------------------


class AssetCardError(LadingError):
    """An invalid card: a field that is missing or has another type, or a configuration that does not fit."""

    exit_code = 3

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class CardFileError(AssetCardError):
    """Card files that cannot be imported; ``problems`` lists every problem, one per line."""

    def __init__(self, problems: Sequence[str]) -> None:
        count = len(problems)
        head = problems[0] if count == 1 else f"{count} problems:\n  " + "\n  ".join(problems)
        super().__init__("", f"{head}\nNothing was imported.")
        self.problems = tuple(problems)


class ModelConfigError(AssetCardError, ValueError):
    """A configuration whose values have the right types but do not make a model together."""

    def __init__(self, family: str, problem: str) -> None:
        super().__init__(
            "",
            f"No model of the {family} family can be built from this configuration: {problem}. Change it where it is "
            "stated: in the card's `model_config`, in its architecture, or in the argument of the call.",
        )
        self.family = family


# --- checkpoints -----------------------------------------------------------------------------------------------------


class ModelCheckpointError(LadingError):
    """A checkpoint that cannot be used."""

    exit_code = 4

    def __init__(self, path: Path | str, message: str) -> None:
        super().__init__(message)
        self.path = path


class CheckpointNotFoundError(ModelCheckpointError, FileNotFoundError):
    """A checkpoint whose file does not exist."""

    exit_code = 2

    def __new__(cls, *args: object) -> Self:
        # `OSError.__new__` reads two arguments as (errno, strerror); the path is an attribute of its own here.
        return super().__new__(cls, *args[-1:])


class CorruptModelCheckpointError(ModelCheckpointError):
    """A file that breaks the rules of its format, or that changed while lading read it."""


class ModelCheckpointMismatchError(ModelCheckpointError):
    """A checkpoint that does not fit the model; ``problems`` lists every missing, unexpected or mis-shaped key."""

    def __init__(self, path: Path | str, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(path, message)
        self.problems = tuple(problems)


class DigestMismatchError(ModelCheckpointError):
    """Bytes whose digest differs from the published or recorded one."""

    def __init__(self, path: Path | str, message: str, *, expected: str, found: str) -> None:
        super().__init__(path, message)
        self.expected = expected
        self.found = found


# --- environment -----------------------------------------------------------------------------------------------------


class FetchError(LadingError):
    """A source that cannot be reached, or whose answer is invalid."""

    exit_code = 5


class AddressError(FetchError):
    """A string that is not a valid address of a source, or not a valid revision."""

    exit_code = 2


class CatalogError(LadingError):
    """A catalog that cannot be opened, is damaged, or is not a catalog."""

    exit_code = 6


class CatalogOutdatedError(CatalogError):
    """A catalog whose schema is older or newer than this version of lading."""

    def __init__(self, message: str, *, expected: int, found: int) -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found


class PolicyError(LadingError):
    """An action that is possible, but refused."""

    exit_code = 7


class RefusedPickleError(PolicyError, ModelCheckpointError):
    """A ``torch.save`` file that holds more than a state dict needs, so that unpickling it could run code."""


class ModelGatedError(PolicyError):
    """A model whose checkpoint cannot be downloaded, or only by those to whom its publisher grants access."""

    def __init__(self, name: str, info_url: str | None, *, message: str | None = None) -> None:
        plain = name.partition("@")[0]
        where = f"Request access at {info_url}" if info_url else "The card does not say where to request access"
        super().__init__(
            message
            or f"{name!r} is a gated model: its card names no checkpoint that can be fetched. {where}; then name the "
            f"downloaded files in a card of your own: `name: {plain}@user` with `checkpoint: /path/to/it`."
        )
        self.name = name
        self.info_url = info_url


class GangError(LadingError):
    """A failure on another rank of the gang; ``ranks`` holds the ranks that failed, where known."""

    exit_code = 8

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class InternalError(LadingError):
    """A bug in lading, or in the code of a family."""

    exit_code = 1


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, the one that it was raised from or while handling, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
