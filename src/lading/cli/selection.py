"""The models that a command line selects, by names, by patterns or all of them, and the work on each."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click
from click.shell_completion import CompletionItem

from lading.cli.command import debugging
from lading.cli.complete import complete_model
from lading.cli.failure import INTERRUPTED, report
from lading.cli.output import note, printable
from lading.errors import CatalogError, CheckpointNotFoundError, ModelNotKnownError, PolicyError, SettingsError
from lading.system.display import counted
from lading.system.filesystem import path_exists

if TYPE_CHECKING:
    from lading.cards.card import AssetCard
    from lading.catalog.store import AssetStore

P = ParamSpec("P")
T = TypeVar("T")

_Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

_AGAIN = (CatalogError, SettingsError, BrokenPipeError, click.ClickException, click.Abort, click.exceptions.Exit)
"""Errors that the next model would meet again, and the ends of a command."""


class Selection:
    """The models that a command line selects.

    A single name is done as if there were no others: its errors are those of the command. Otherwise an error of one
    model is a line on stderr, and the others are done, too; the command then exits with the highest code of any model.
    """

    def __init__(self, words: tuple[str, ...], *, every: bool = False, here: bool = False, cards: bool = False) -> None:
        """Select models.

        :param here: patterns match only models whose files are on this machine.
        :param cards: patterns also match cards that are not models.
        """
        self._words = words
        self._every = every
        self._here = here
        self._cards = cards
        self._codes: dict[str, int] = {}
        self.several = every or len(words) > 1
        """True if the command line can select several models, so that results are lists. Before :meth:`resolve`, a
        pattern counts as one."""

    def __bool__(self) -> bool:
        return bool(self._words) or self._every

    @property
    def failed(self) -> list[str]:
        """The names and patterns that failed."""
        return [name for name, code in self._codes.items() if code]

    def resolve(self, meaning: Callable[[str], T], store: AssetStore) -> dict[str, T]:
        """Return what each selected name means; report wrong names before any work.

        :param meaning: returns what a name means, or raises an error of that name.
        """
        words = self._words or [model.name for model in store.models(status="ready")]
        if not words:
            note("no model is on this machine.")
        self.several = self.several or any(_is_pattern(word, store) for word in words)

        found: dict[str, T] = {}
        for word in dict.fromkeys(words):
            with self._reporting(word):
                for name in self._expand(word, store):
                    with self._reporting(name):
                        found[name] = meaning(name)

        return found

    def each(self, targets: Mapping[str, T], work: Callable[[str, T], int | None]) -> None:
        """Do the work on each target, even if that on another one failed.

        :param work: takes a name and what it means; returns an exit code if something is wrong and it said so.
        """
        for name, target in targets.items():
            with self._reporting(name):
                self._codes[name] = work(name, target) or 0

    def each_model(
        self, work: Callable[[str, AssetCard | Path], int | None], store: AssetStore, *, ask: bool = True
    ) -> None:
        """Do the work, as :meth:`each`, on each selected model: its card, or the path that no card has.

        :param ask: as :func:`lading.checkpoints.names.find_card` takes it.
        """
        from lading.checkpoints.names import find_card

        self.each(self.resolve(lambda name: find_card(name, store, ask=ask), store), work)

    @contextmanager
    def _reporting(self, name: str) -> Iterator[None]:
        """Report an error of one of several models, and go on."""
        try:
            yield
        except _AGAIN:
            raise
        except Exception as error:  # even a bug in the family of one model
            if not self.several:
                raise
            self._codes[name] = report(error, debug=debugging(), of=name)

    def finish(self) -> None:
        """Write a summary, if there are several models, and exit with the highest code of any, unless all are good."""
        if len(self._codes) > 1:
            failed, count = self.failed, counted(len(self._codes), "model")
            names = ", ".join(map(printable, failed))
            note(f"{len(failed)} of {count} failed: {names}" if failed else f"{count} done")
        if any(self._codes.values()):
            click.get_current_context().exit(max(self._codes.values()))

    def _expand(self, word: str, store: AssetStore) -> list[str]:
        if not _is_pattern(word, store):
            return [word]

        pattern, at, env = word.partition("@")
        models = store.models(pattern, include_all=self._cards, status="ready" if self._here else None)
        if models:
            return [f"{model.name}{at}{env}" for model in models]
        if self._here and store.models(pattern, limit=1):
            raise CheckpointNotFoundError(
                word, f"No model that matches {word!r} is on this machine. `lading list {word!r}` shows the others."
            )

        raise ModelNotKnownError(word)


def has_wildcard(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")


def confirm(question: str, *, refusal: str) -> None:
    """Ask on the terminal whether to remove what was listed; exit if the answer is no.

    :param refusal: what to say without a terminal.

    :raises PolicyError: standard input is not a terminal.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise PolicyError(refusal)
    if not click.confirm(question, err=True):
        note("nothing was removed.")
        click.get_current_context().exit(INTERRUPTED)


def _is_pattern(word: str, store: AssetStore) -> bool:
    if not has_wildcard(word) or "://" in word:
        return False
    from lading.checkpoints.names import as_path

    if as_path(word) is not None:
        return False
    is_path = "/" in word and path_exists(word)

    return not is_path and store.maybe_retrieve_card(word) is None


def select_models(
    metavar: str = "NAME", *, complete: _Complete = complete_model, here: bool = False, required: bool = True
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Add the arguments ``NAME...`` and the option ``--every`` to a command, which receives them as ``selection``.

    :param here: patterns match only models whose files are on this machine.
    :param required: refuse a command line that selects nothing.
    """

    def decorate(command: Callable[P, None]) -> Callable[P, None]:
        @click.argument("words", metavar=f"[{metavar}]...", nargs=-1, shell_complete=complete)
        @click.option("--every", is_flag=True, help="All models whose files are on this machine.")
        @functools.wraps(command)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            words, every = kwargs.pop("words"), kwargs.pop("every")
            if words and every:
                raise click.UsageError("Give names or --every, not both.", click.get_current_context())
            if required and not words and not every:
                raise click.UsageError(f"Missing argument: give {metavar}, or --every.", click.get_current_context())

            command(*args, selection=Selection(words, every=every, here=here), **kwargs)  # type: ignore[arg-type]

        return wrapper

    return decorate
