"""The checkpoints of a training run, as cards of this process."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace as with_changes
from pathlib import Path

from lading.cards.card import CardEntry
from lading.catalog.import_cards import collect
from lading.catalog.memory_cards import MEMORY, remember
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.records import ImportReport
from lading.errors import AssetCardError, CardFileError
from lading.system.filesystem import expand_home

_STEP = re.compile(r"step_([0-9]+)")


def register_checkpoint_models(
    checkpoint_dir: str | Path, *, replace: bool = False, store: CardStore | None = None
) -> ImportReport:
    """Register the checkpoints that fairseq2's trainer has written to a folder as cards of this process.

    They have the names that fairseq2 gives them: ``checkpoint_step_N`` for the folder ``step_N``, ``last_checkpoint``
    for the highest step; and, if the folder ``scores`` holds scores, ``best_checkpoint`` for the highest one and
    ``best_checkpoint_I`` for each, ordered from 0. All are based on the card ``checkpoint`` of the folder's
    ``model.yaml``. Those of another folder take the place of cards in memory with the same names.

    Source of the rules: fairseq2 0.8.1, ``fairseq2.checkpoint.model_metadata``.

    :param replace: hide cards of the catalog with these names.

    :returns: the names of the cards.

    :raises FileNotFoundError: the folder has no ``model.yaml``.
    :raises CardFileError: ``model.yaml`` is not valid, or the catalog has a card with one of these names.
    :raises AssetCardError: ``model.yaml`` has no card ``checkpoint``, or a score is not a number.
    """
    folder = expand_home(checkpoint_dir).absolute()
    (file,) = collect([folder / "model.yaml"])
    if file.problems:
        raise CardFileError(file.problems)
    if not any(entry.name == "checkpoint" and not entry.env for entry in file.cards):
        raise AssetCardError(
            "checkpoint",
            f"{folder / 'model.yaml'}: expected a card named 'checkpoint', as fairseq2 writes it, found none.",
        )

    steps = _steps(folder)
    named = {f"checkpoint_step_{number}": path for number, path in steps.items()}
    if steps:
        named["last_checkpoint"] = steps[max(steps)]
    best = sorted(_scores(folder, steps), reverse=True)
    named |= {f"best_checkpoint_{rank}": steps[number] for rank, (_, number) in enumerate(best)}
    if best:
        named["best_checkpoint"] = named["best_checkpoint_0"]
    cards = tuple(
        CardEntry(name=name, metadata={"base": "checkpoint", "checkpoint": str(path / "model")}, source=str(path))
        for name, path in named.items()
    )

    with open_store(store).database.session() as session:
        return remember(session, with_changes(file, source=MEMORY, cards=(*file.cards, *cards)), replace=replace)


def _steps(folder: Path) -> dict[int, Path]:
    """Return the folders of the steps, by number; one that is still being written has another name."""
    return {
        int(match[1]): path
        for path in sorted(folder.iterdir())
        if (match := _STEP.fullmatch(path.name)) is not None and path.is_dir()
    }


def _scores(folder: Path, steps: Mapping[int, Path]) -> Iterator[tuple[float, int]]:
    for number in steps:
        path = folder / "scores" / f"step_{number}.txt"
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        try:
            yield float(text), number
        except ValueError:
            raise AssetCardError(
                f"checkpoint_step_{number}", f"{path}: expected a number in the first line, found {text!r}."
            ) from None
