"""Every error that lading raises on purpose.

::

    LadingError                                       exit code of the CLI
    ├── AssetNotFoundError                            2  no card of that name
    ├── ModelNotKnownError                            2  no model of that name
    ├── ModelArchitectureNotKnownError                2
    ├── ModelFamilyNotKnownError                      2
    ├── NotSupportedError                             2  right question, but not one that lading answers
    ├── SettingsError                                 2  a variable of the environment that means nothing here
    ├── QueryError                                    2  SQL that the database does not understand
    ├── AssetCardError                                3  a card that is wrong, or of a family that is not registered
    │   ├── CardFileError                             3  files of cards; carries every problem found (`.problems`)
    │   └── ModelConfigError                          3  no model can be made of it; also a ValueError
    ├── ModelCheckpointError                          4
    │   ├── CheckpointNotFoundError                   2  also a FileNotFoundError
    │   ├── CorruptModelCheckpointError               4  the file breaks the rules of its format
    │   ├── ModelCheckpointMismatchError              4  a good file that does not fit the model (`.problems`)
    │   └── DigestMismatchError                       4  the bytes are not the ones that were published
    ├── FetchError                                    5  network
    │   └── AddressError                              2  no address, so nobody was asked; of a card, an AssetCardError
    ├── CatalogError                                  6
    │   └── CatalogOutdatedError                      6  `lading db upgrade` mends it
    ├── PolicyError                                   7  possible, but refused
    │   ├── ModelGatedError                           7
    │   └── RefusedPickleError                        7  a file that could run code; also a ModelCheckpointError
    ├── GangError                                     8  another rank failed, or cannot be reached
    └── InternalError                                 1  a mistake in lading or in a family's code

A wrong argument is a plain ``ValueError`` or ``TypeError``, as everywhere in Python.

Errors travel between ranks, so each of them pickles with all of its attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar, Self


class LadingError(Exception):
    """The base of all errors of lading."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """What was expected, what was found, where, and what to do.

        What a terminal would not show as it is, such as the control characters of a tensor's name, is escaped here, for
        all errors; line breaks stay.
        """
        return escaped(str(self.args[0]), keep="\n")

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        # The stock way calls the constructor with `args`, which holds the message alone.
        return _restore, (type(self), self.args, self.__dict__.copy())


def escaped(text: str, *, keep: str = "") -> str:
    """Return ``text`` with line breaks, terminal controls and other invisible characters written as escapes.

    :param keep: characters that stay as they are.
    """
    if text.isprintable():
        return text

    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def _restore(kls: type[LadingError], args: tuple[object, ...], state: dict[str, object]) -> LadingError:
    error = kls.__new__(kls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the names nearest to ``name``, with a leading space; empty where none is near."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.6)

    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


# --- names -----------------------------------------------------------------------------------------------------------


class AssetNotFoundError(LadingError):
    """No card of this name is in the catalog."""

    exit_code = 2

    def __init__(self, name: str, hint: str = "") -> None:
        super().__init__(f"No asset card named {name!r} is in the catalog.{hint or ' `lading list --all` shows them.'}")
        self.name = name
        self.hint = hint


class ModelNotKnownError(LadingError):
    """No model of this name is in the catalog."""

    exit_code = 2

    def __init__(self, name: str, hint: str = "") -> None:
        super().__init__(f"No model named {name!r} is in the catalog.{hint or ' `lading list` shows them.'}")
        self.name = name


class ModelArchitectureNotKnownError(LadingError):
    """The family has no architecture of this name."""

    exit_code = 2

    def __init__(self, arch: str, family: str | None = None, hint: str = "") -> None:
        of = "" if family is None else f" of the {family} family"
        super().__init__(f"{arch!r} is not a known architecture{of}.{hint or ' `lading archs` shows them.'}")
        self.arch = arch
        self.family = family


class ModelFamilyNotKnownError(LadingError):
    """No installed package registers a family of this name."""

    exit_code = 2

    def __init__(self, name: str, hint: str = "") -> None:
        super().__init__(
            f"No installed package registers a model family named {name!r} (entry point group `lading.families`)."
            f"{hint or ' `lading families` shows the registered ones.'}"
        )
        self.name = name


class NotSupportedError(LadingError):
    """The question is right, but lading (or this family) does not do that."""

    exit_code = 2


class SettingsError(LadingError):
    """A variable of the environment whose value means nothing here."""

    exit_code = 2


class QueryError(LadingError):
    """SQL that the database does not understand."""

    exit_code = 2


# --- cards -----------------------------------------------------------------------------------------------------------


class AssetCardError(LadingError):
    """A card that is wrong: a missing field, one of another type, a configuration that does not fit."""

    exit_code = 3

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class CardFileError(AssetCardError):
    """Card files that cannot be imported; ``problems`` holds all that is wrong, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        count = len(problems)
        head = problems[0] if count == 1 else f"{count} problems:\n  " + "\n  ".join(problems)
        super().__init__("", f"{head}\nNothing was imported.")
        self.problems = tuple(problems)


class ModelConfigError(AssetCardError, ValueError):
    """A configuration whose values are each of the right type, but of which together no model can be made."""

    def __init__(self, family: str, problem: str) -> None:
        super().__init__(
            "",
            f"No model of the {family} family can be made of this configuration: {problem}. Change it where it is "
            "stated: in the `model_config` of the card, in its architecture, or in the argument of the call.",
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
    """No file is where the checkpoint should be."""

    exit_code = 2

    def __new__(cls, *args: object) -> Self:
        # `OSError.__new__` reads two arguments as (errno, strerror); the path is an attribute of its own here.
        return super().__new__(cls, *args[-1:])


class CorruptModelCheckpointError(ModelCheckpointError):
    """A file that breaks the rules of its format, or that changed while it was read."""


class ModelCheckpointMismatchError(ModelCheckpointError):
    """A checkpoint that does not fit the model; ``problems`` holds every missing, unexpected or mis-shaped key."""

    def __init__(self, path: Path | str, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(path, message)
        self.problems = tuple(problems)


class DigestMismatchError(ModelCheckpointError):
    """The bytes are not the ones that were published or recorded."""

    def __init__(self, path: Path | str, message: str, *, expected: str, found: str) -> None:
        super().__init__(path, message)
        self.expected = expected
        self.found = found


# --- the world -------------------------------------------------------------------------------------------------------


class FetchError(LadingError):
    """A source that cannot be reached, or that answers nonsense."""

    exit_code = 5


class AddressError(FetchError):
    """What is to name a source, or a revision of it, and cannot be the name of one."""

    exit_code = 2


class CatalogError(LadingError):
    """A catalog that cannot be opened, is damaged, or is not a catalog at all."""

    exit_code = 6


class CatalogOutdatedError(CatalogError):
    """The catalog's schema is older (or newer) than this version of lading."""

    def __init__(self, message: str, *, expected: int, found: int) -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found


class PolicyError(LadingError):
    """Possible, but refused."""

    exit_code = 7


class RefusedPickleError(PolicyError, ModelCheckpointError):
    """A file of ``torch.save`` that holds more than a state dict needs: unpickling it could run code."""


class ModelGatedError(PolicyError):
    """No checkpoint to download, or not for everyone: its publisher hands it out on request."""

    def __init__(self, name: str, info_url: str | None, *, message: str | None = None) -> None:
        plain = name.partition("@")[0]
        where = f"Ask for access at {info_url}" if info_url else "The card does not say where to ask for access"
        super().__init__(
            message
            or f"{name!r} is a gated model: its card names no checkpoint that can be fetched. {where}; then give the "
            f"downloaded files to a card of your own: `name: {plain}@user` with `checkpoint: /path/to/it`."
        )
        self.name = name
        self.info_url = info_url


class GangError(LadingError):
    """Another rank of the gang failed, or cannot be reached; ``ranks`` holds those to blame, where known."""

    exit_code = 8

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class InternalError(LadingError):
    """A mistake in lading itself, or in the code of a family."""

    exit_code = 1
