"""Model families: the code behind a ``model_family`` field.

A family registers itself as an entry point of the group ``lading.families``, the built-in ones too::

    [project.entry-points."lading.families"]
    qwen = "lading.families.qwen:FAMILY"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint
from typing import Any, Generic, TypeVar

from torch import Tensor, device, dtype
from torch.nn import Module

from lading.errors import InternalError, ModelFamilyNotKnownError, did_you_mean
from lading.models.parallel_plan import ParallelPlan
from lading.planning.rules import Rule
from lading.system.entry_points import registered

ENTRY_POINT_GROUP = "lading.families"

ModelT = TypeVar("ModelT", bound=Module)
ModelConfigT = TypeVar("ModelConfigT")


def _no_rules(config: Any) -> Sequence[Rule]:
    return ()


def _no_plan(config: Any) -> ParallelPlan:
    return ParallelPlan()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family(Generic[ModelT, ModelConfigT]):
    """The behaviour of a model family. Its numbers (architectures) and its models (cards) are rows of the catalog."""

    name: str
    kls: type[ModelT]
    config_kls: type[ModelConfigT]
    """A dataclass; its defaults are the family's default architecture."""
    build: Callable[[ModelConfigT], ModelT]
    """Make the module on the current default device (the meta device, when weights are loaded into it) with the
    current default dtype, parameters uninitialised.

    Modules with non-persistent buffers implement ``reset_non_persistent_buffers(device)``, which computes them anew.
    """
    init: Callable[[ModelT, ModelConfigT, str, Tensor], None]
    """Fill a tensor with random numbers, by the architecture's own scheme for the parameter or persistent buffer of
    that name. The tensor is the whole one, whatever the model holds of it.

    Numbers come from torch's default generator, which is seeded for each name: the order of the calls does not matter.
    """
    rules: Callable[[ModelConfigT], Sequence[Rule]] = _no_rules
    """How tensors of a checkpoint map to parameters, where their names differ."""
    may_lack: Callable[[ModelConfigT, Sequence[str]], Sequence[str]] | None = None
    """Of these parameters and persistent buffers, which no tensor of a checkpoint makes, those that published
    checkpoints lack by design: ``init`` fills them. ``None`` means that there are none."""
    rules_of_names: Callable[[ModelConfigT, Sequence[str]], Sequence[Rule]] | None = None
    """Instead of ``rules``, where the rules depend on the names of the tensors that a checkpoint holds.

    :raises NotSupportedError: no rules can say what these tensors make.
    """
    parallel_plan: Callable[[ModelConfigT], ParallelPlan] = _no_plan
    """How a model is split over the ranks of gangs; axes of which it says nothing are ignored."""
    hf_model_types: frozenset[str] = frozenset()
    """The values of ``model_type`` in a Hugging Face ``config.json`` that this family can read."""
    hf_architectures: frozenset[str] = frozenset()
    """The values in ``architectures`` of that file that this family can read; empty means any, where no other family
    shares the model type."""
    hf_part_of: frozenset[str] = frozenset()
    """Further values of ``model_type``, of models that have one of this family as a part: it reads that part, where it
    is asked for by its name."""
    from_hf: Callable[[Mapping[str, object]], ModelConfigT] | None = None
    """The configuration that a Hugging Face ``config.json`` stands for.

    :raises NotSupportedError: the file asks for something that the family does not do.
    """
    to_hf: Callable[[ModelConfigT], Mapping[str, object]] | None = None
    """The way back: the ``config.json`` that describes a model of the configuration, as transformers reads it.

    :raises NotSupportedError: no such file can describe it.
    """
    reads_other_model_types: bool = False
    """Whether ``from_hf`` also takes the model types that no other family reads."""
    untie: Callable[[ModelT, Sequence[str]], None] | None = None
    """Make parameters of their own of further names of tied ones, for a checkpoint that holds other numbers for them.
    ``None`` refuses such a checkpoint."""
    complete: Callable[[ModelConfigT, Mapping[str, object]], ModelConfigT] | None = None
    """A configuration with what it lacks taken from the ``config.json`` beside the checkpoint, which is empty where
    there is none; for a family whose cards do not state the sizes of their models.

    :raises NotSupportedError: the file asks for something that the family does not do.
    :raises PolicyError: it asks for code of a repository to be run.
    """
    dtypes: Callable[[ModelT, ModelConfigT, dtype], Mapping[str, dtype]] | None = None
    """Name the parameters and persistent buffers of a model in the given dtype that are of another one, such as those
    that a class keeps in float32, and say of which. The model is made in float32, without memory. ``None`` means that
    there are none."""
    reset_buffers: Callable[[ModelT, ModelConfigT, device, dtype], None] | None = None
    """Compute non-persistent buffers of a model in the given dtype again, for modules that do not implement
    ``reset_non_persistent_buffers``; the parameters are there by then."""
    explain: Callable[[Sequence[str], Sequence[str]], str | None] | None = None
    """Say what to do about a checkpoint that does not fit, from the names of the parameters that it lacks and of the
    tensors that no rule knows; ``None`` where these suggest nothing."""
    supports_meta: bool = True
    """Whether ``create_new_model(…, meta=True)`` may be asked for."""
    restrict: bool = True
    """Whether unpickling is limited to tensors and plain containers by default."""

    def rules_for(self, config: ModelConfigT, names: Sequence[str]) -> Sequence[Rule]:
        """How tensors of these names map to parameters."""
        return self.rules(config) if self.rules_of_names is None else self.rules_of_names(config, names)


def get_family(name: str) -> Family[Any, Any]:
    """The family that is registered under ``name``.

    :raises ModelFamilyNotKnownError: none is.
    :raises InternalError: what the entry point names cannot be imported, or is no family of this name.
    """
    entry = _entry_points().get(name)
    if entry is None:
        raise ModelFamilyNotKnownError(name, did_you_mean(name, _entry_points()))

    return _load(entry)


def family_of_model_type(model_type: str, architectures: Iterable[str] = ()) -> Family[Any, Any] | None:
    """The family that reads checkpoints of this Hugging Face ``model_type``; ``None`` where none does.

    One that reads all model types comes after those that name the type.

    :param architectures: what the file's key of that name says, for types that several families share.
    """
    names = frozenset(architectures)
    families = [get_family(name) for name in sorted(_entry_points())]
    for family in families:
        if model_type in family.hf_model_types and (not family.hf_architectures or family.hf_architectures & names):
            return family

    return next((family for family in families if family.reads_other_model_types), None)


@lru_cache(maxsize=1)
def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in registered(ENTRY_POINT_GROUP)}


@lru_cache(maxsize=256)
def _load(entry: EntryPoint) -> Family[Any, Any]:
    try:
        family = entry.load()
    except Exception as error:
        raise InternalError(
            f"The model family {entry.name!r} is registered as {entry.value!r}, which cannot be imported: {error}"
        ) from error

    if not isinstance(family, Family) or family.name != entry.name:
        raise InternalError(
            f"The model family {entry.name!r} is registered as {entry.value!r}, which is expected to be a Family of "
            f"that name, but is {family!r}."
        )

    return family
