"""Pipeline stages: a module on the meta device in which modules of other stages become ``None``.

The modules that stay keep their names and indices, so that the tensors of a checkpoint need no renumbering.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache

from torch.nn import Module, ModuleDict, ModuleList

from lading.gangs import Gang
from lading.models.parallel_plan import Stages

log = logging.getLogger("lading")


def cut_to_stage(module: Module, stages: Stages, pp: Gang, *, family: str) -> None:
    """Remove the modules of other stages than this rank's from ``module``.

    A parameter that is tied across stages becomes a separate copy in each of them.

    :param family: the name of the family, for the log.

    :raises NotSupportedError: there are fewer layers than stages.
    """
    absent = [name for name, stage in stages.places(pp.size).items() if stage != pp.rank]
    before = tied_names(module)

    for name in absent:
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        # A model can lack some of its modules.
        if getattr(parent, leaf, None) is not None:
            setattr(parent, leaf, None)

    held = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for names in before:
        own = [name for name in names if name in held]
        if 0 < len(own) < len(names):
            _log_copies(family, own[0], ", ".join(name for name in names if name not in held))


def holders(stages: Stages, names: Sequence[str], aliases: Mapping[str, str], pp: int) -> list[frozenset[int] | None]:
    """Return the stages, of ``pp``, that hold each tensor after :func:`cut_to_stage`; ``None`` means all of them.

    :param names: the names of the tensors in the state dict; for a tied one, the first.
    :param aliases: their other names → the first.

    :raises NotSupportedError: there are fewer layers than stages.
    """
    places = stages.places(pp)
    others: dict[str, list[str]] = {}
    for alias, first in aliases.items():
        others.setdefault(first, []).append(alias)

    found: list[frozenset[int] | None] = []
    for name in names:
        own = {_stage_of(each, places) for each in (name, *others.get(name, ()))}
        found.append(None if None in own else frozenset(stage for stage in own if stage is not None))

    return found


def _stage_of(name: str, places: Mapping[str, int]) -> int | None:
    while name:
        name = name.rpartition(".")[0]
        if name in places:
            return places[name]

    return None


def modules_of_other_dtype(module: Module, other_dtype_names: Collection[str]) -> list[str]:
    """Return the names of the largest modules in ``module`` with only the given parameters, none tied to others.

    :param other_dtype_names: the names of parameters.
    """
    found: list[str] = []
    ties = tied_names(module)
    for name, part in module.named_modules():
        if isinstance(part, ModuleList | ModuleDict):
            continue  # never called, so that FSDP cannot gather it
        if name and not any(name.startswith(f"{outer}.") for outer in found[-1:]):
            own = parameter_names(module, name)
            if own and all(each in other_dtype_names for each in own) and not is_tied_outside(name, ties):
                found.append(name)

    return found


def parameter_names(module: Module, part: str) -> list[str]:
    """Return the full names of the parameters of the submodule ``part``."""
    return [f"{part}.{name}" for name, _ in module.get_submodule(part).named_parameters(remove_duplicate=False)]


def is_tied_outside(part: str, ties: Iterable[Sequence[str]]) -> bool:
    """Return whether a tied parameter has names both inside and outside of the submodule ``part``.

    :param ties: the result of :func:`tied_names`.
    """
    return any(len({name.startswith(f"{part}.") for name in tied}) == 2 for tied in ties)


def tied_names(module: Module) -> list[list[str]]:
    """Return the names of each parameter with several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)

    return [tied for tied in names.values() if len(tied) > 1]


@lru_cache(maxsize=256)
def _log_copies(family: str, own: str, others: str) -> None:
    log.warning(
        "this stage of a %s model holds a copy of %s, which is tied to %s of another stage: sum their gradients in "
        "training",
        family,
        own,
        others,
    )
