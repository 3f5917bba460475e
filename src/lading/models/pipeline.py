"""A module without memory becomes a stage of a pipeline: what belongs to other stages leaves ``None`` behind.

What stays keeps its name, index included, so that a checkpoint needs no renumbering.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache

from torch.nn import Module, ModuleDict, ModuleList

from lading.gangs import Gang
from lading.models.parallel_plan import Stages

log = logging.getLogger("lading")


def cut(module: Module, stages: Stages, pp: Gang, *, family: str) -> None:
    """Take the modules of other stages than this rank's out of ``module``.

    A parameter that is tied across stages stays in each of them, as a copy of its own.

    :param family: its name, for the log.

    :raises NotSupportedError: there are fewer layers than stages.
    """
    absent = [name for name, stage in stages.places(pp.size).items() if stage != pp.rank]
    before = tied_names(module)

    for name in absent:
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        # A model can be made without some of its parts.
        if getattr(parent, leaf, None) is not None:
            setattr(parent, leaf, None)

    held = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for names in before:
        own = [name for name in names if name in held]
        if 0 < len(own) < len(names):
            _log_copies(family, own[0], ", ".join(name for name in names if name not in held))


def holders(stages: Stages, names: Sequence[str], aliases: Mapping[str, str], pp: int) -> list[frozenset[int] | None]:
    """Which of ``pp`` stages :func:`cut` leaves each tensor to; ``None``: all of them.

    :param names: of the tensors of a module's state; of a tied one the first.
    :param aliases: their further names → the first.

    :raises NotSupportedError: there are fewer layers than stages.
    """
    places = stages.places(pp)
    further: dict[str, list[str]] = {}
    for alias, first in aliases.items():
        further.setdefault(first, []).append(alias)

    found: list[frozenset[int] | None] = []
    for name in names:
        own = {_place(each, places) for each in (name, *further.get(name, ()))}
        found.append(None if None in own else frozenset(stage for stage in own if stage is not None))

    return found


def _place(name: str, places: Mapping[str, int]) -> int | None:
    while name:
        name = name.rpartition(".")[0]
        if name in places:
            return places[name]

    return None


def apart_modules(module: Module, apart: Collection[str]) -> list[str]:
    """Return the names of the largest modules in ``module`` whose parameters are all among ``apart``, and are tied to
    none of another module.

    :param apart: names of parameters.
    """
    found: list[str] = []
    ties = tied_names(module)
    for name, part in module.named_modules():
        if isinstance(part, ModuleList | ModuleDict):
            continue  # which nothing calls, so that FSDP could not gather it
        if name and not any(name.startswith(f"{outer}.") for outer in found[-1:]):
            own = own_names(module, name)
            if own and all(each in apart for each in own) and not crosses(name, ties):
                found.append(name)

    return found


def own_names(module: Module, part: str) -> list[str]:
    """Return the names that the parameters of a part of ``module`` have in it."""
    return [f"{part}.{name}" for name, _ in module.get_submodule(part).named_parameters(remove_duplicate=False)]


def crosses(part: str, ties: Iterable[Sequence[str]]) -> bool:
    """Return whether a parameter has names both in and outside of a part of a module.

    :param ties: as :func:`tied_names` gives them.
    """
    return any(len({name.startswith(f"{part}.") for name in tied}) == 2 for tied in ties)


def tied_names(module: Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)

    return [tied for tied in names.values() if len(tied) > 1]


@lru_cache(maxsize=256)
def _log_copies(family: str, own: str, others: str) -> None:
    log.warning(
        "this stage of a %s model holds a copy of %s, which is tied to %s of another stage: whoever trains the model "
        "adds up their gradients",
        family,
        own,
        others,
    )
