"""Model families: the code behind a ``model_family`` field.

A family registers itself as an entry point of the group ``lading.families``, the built-in ones too::

    [project.entry-points."lading.families"]
    qwen = "lading.families.qwen:FAMILY"

A program can also register one for its process: :func:`register_family`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lading.errors import InternalError, ModelFamilyNotKnownError, TorchNotFoundError, did_you_mean
from lading.formats.manifest import SCALE_SUFFIX
from lading.models.parallel_plan import ParallelPlan
from lading.models.targets import Shape
from lading.planning.block_scales import SCALES_RULE
from lading.planning.rules import Rule
from lading.system.entry_points import FAMILIES_GROUP, register, registered, registered_here
from lading.system.needs import needs_torch

if TYPE_CHECKING:
    from torch import Tensor, device, dtype
    from torch.nn import Module

ModelT = TypeVar("ModelT", bound="Module")
ModelConfigT = TypeVar("ModelConfigT")


def _no_rules(config: Any) -> Sequence[Rule]:
    return ()


def _no_plan(config: Any) -> ParallelPlan:
    return ParallelPlan()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family(Generic[ModelT, ModelConfigT]):
    """The behavior of a model family. Its sizes (architectures) and models (cards) are rows of the catalog."""

    name: str
    kls: type[ModelT] | str
    """The class of its models; or its place, ``package.module:Class``, which is imported with the first model."""
    config_kls: type[ModelConfigT]
    """The configuration, a dataclass; its defaults are the default architecture of the family."""
    build: Callable[[ModelConfigT], ModelT]
    """A function that builds the module on the current default device (the meta device for a load), with the current
    default dtype and uninitialized parameters.

    Modules with non-persistent buffers implement ``reset_non_persistent_buffers(device)``, which recomputes them; or,
    as in fairseq2, without ``device``, which then fills the buffers of the module in place.
    """
    init: Callable[[ModelT, ModelConfigT, str, Tensor], None]
    """A function that initializes the parameter or persistent buffer of a name. The tensor is the whole one, whatever
    part of it the model holds.

    Random numbers come from torch's default generator, which is seeded per name: the order of calls does not matter.
    """
    shapes: Callable[[ModelConfigT], Mapping[str, Shape]] | None = None
    """A function that returns the names and shapes of the model's parameters and persistent buffers, in the order of
    its state dict; for the further name of a tied one, its first name. All parameters hold floating-point numbers. With
    it ``lading check`` needs neither a module nor torch. ``None`` means that the module is built to see them.

    :raises ValueError: the values of the configuration are inconsistent.
    """
    rules: Callable[[ModelConfigT], Sequence[Rule]] = _no_rules
    """The rules that map tensors of a checkpoint to parameters with other names."""
    published: Callable[[ModelConfigT], Sequence[Rule]] = _no_rules
    """The rules, among those of ``rules``, of published checkpoints, which an export applies backwards: to write each
    expert of a model that stacks them as tensors of its own, for example."""
    may_lack: Callable[[ModelConfigT, Sequence[str]], Sequence[str]] | None = None
    """A function that selects, from the names that a checkpoint lacks, those that published checkpoints lack by design:
    ``init`` fills them. ``None`` means that no name may be missing."""
    rules_of_names: Callable[[ModelConfigT, Sequence[str]], Sequence[Rule]] | None = None
    """The rules for a checkpoint with tensors of these names, in place of ``rules``.

    :raises NotSupportedError: no rules can express the mapping.
    """
    transposed: Callable[[ModelConfigT], frozenset[str]] | None = None
    """A function that returns the weights with the inputs as their first dim, as in transformers' ``Conv1D``; adapters
    are merged into them accordingly. ``None`` means that there are no such weights."""
    parallel_plan: Callable[[ModelConfigT], ParallelPlan] = _no_plan
    """The plan that splits a model over the ranks of gangs; axes without a plan are ignored."""
    hf_model_types: frozenset[str] = frozenset()
    """The values of ``model_type`` in a Hugging Face ``config.json`` that this family reads."""
    hf_architectures: frozenset[str] = frozenset()
    """The values of ``architectures`` in that file that this family reads; empty means any, if no other family shares
    the model type."""
    hf_part_of: frozenset[str] = frozenset()
    """The values of ``model_type`` of models that contain a model of this family, which the family reads if it is
    requested by name."""
    from_hf: Callable[[Mapping[str, object]], ModelConfigT] | None = None
    """The conversion of a Hugging Face ``config.json`` to a configuration.

    :raises NotSupportedError: the file requires something that the family does not support.
    """
    hf_stated: Callable[[Mapping[str, object]], frozenset[str]] | None = None
    """A function that returns the fields of a configuration that a ``config.json`` states itself, rather than by a
    default. ``None`` means all."""
    to_hf: Callable[[ModelConfigT], Mapping[str, object]] | None = None
    """The conversion of a configuration to a ``config.json`` that transformers reads.

    :raises NotSupportedError: no such file can describe the configuration.
    """
    reads_other_model_types: bool = False
    """True if ``from_hf`` also reads the model types that no other family reads."""
    untie: Callable[[ModelT, Sequence[str]], None] | None = None
    """A function that unties parameters, for a checkpoint that stores different values for them. ``None`` means that
    such a checkpoint is refused."""
    complete: Callable[[ModelConfigT, Mapping[str, object]], ModelConfigT] | None = None
    """A function that completes a configuration from the ``config.json`` beside the checkpoint (empty without
    one), for a family whose cards do not contain the sizes of their models.

    :raises NotSupportedError: the file requires something that the family does not support.
    :raises PolicyError: the file requires code of a repository.
    """
    dtypes: Callable[[ModelT, ModelConfigT, dtype], Mapping[str, dtype]] | None = None
    """A function that returns the parameters and persistent buffers with another dtype than the given one, such as
    those that a class keeps in float32, and their dtypes. Its model is built in float32 on the meta device. ``None``
    means that all have the given dtype."""
    reset_buffers: Callable[[ModelT, ModelConfigT, device, dtype], None] | None = None
    """A function that recomputes non-persistent buffers for a model in the given dtype, for modules that do not
    implement ``reset_non_persistent_buffers``; the parameters are loaded by then."""
    explain: Callable[[Sequence[str], Sequence[str]], str | None] | None = None
    """A function that returns advice for a checkpoint that does not fit, from the names of missing parameters and of
    unexpected tensors, or ``None``."""
    supports_meta: bool = True
    """True if the family supports ``create_new_model(…, meta=True)``."""
    restrict: bool = True
    """True if unpickling is limited to tensors and plain containers by default."""

    def lists(self, model_type: str, architectures: Collection[str]) -> bool:
        """Return whether the family lists the ``model_type`` and one of the ``architectures`` of a ``config.json``."""
        if model_type not in self.hf_model_types:
            return False

        return not self.hf_architectures or not self.hf_architectures.isdisjoint(architectures)

    @property
    def model_kls(self) -> type[ModelT]:
        """The class of its models, which this imports."""
        return find_class(self.kls, self.name)

    def rules_for(self, config: ModelConfigT, names: Sequence[str]) -> Sequence[Rule]:
        """Return the rules that map tensors of these names to parameters."""
        own = [name for name in names if not name.endswith(SCALE_SUFFIX)]
        rules = self.rules(config) if self.rules_of_names is None else self.rules_of_names(config, own)

        return rules if len(own) == len(names) else (SCALES_RULE, *rules)


def check_config_type(config: Any, family: Family[Any, Any]) -> None:
    """Require that ``config`` is an instance of the family's configuration class.

    :raises TypeError: it is not.
    """
    if not isinstance(config, family.config_kls):
        raise TypeError(
            f"`config` must be of type {family.config_kls.__name__}, the configuration of the {family.name} family, "
            f"but is of type {type(config).__name__}"
        )


def find_class(kls: type[ModelT] | str, family: str) -> type[ModelT]:
    """Return the class of a family's models, after its import if ``kls`` is its place.

    :raises TorchNotFoundError: torch is not installed.
    """
    if not isinstance(kls, str):
        return kls
    with needs_torch(f"A model of the {family} family"):
        found: type[ModelT] = resolve_name(kls)

    return found


def register_family(family: Family[Any, Any]) -> None:
    """Register a family for this process, in place of an entry point of a package.

    A family of the same name that was registered by this call before is replaced.

    :raises ValueError: an installed package registers a family of this name.
    """
    if family.name in _entry_points():
        raise ValueError(
            f"`family` must have a name that no installed package registers, but {family.name!r} is the one of "
            f"{_entry_points()[family.name].value}"
        )

    register(FAMILIES_GROUP, family.name, family)


def get_family(name: str, families: Mapping[str, Family[Any, Any]] | None = None) -> Family[Any, Any]:
    """Return the family that is registered as ``name``.

    :param families: the families to choose from, by name; default: those that are registered.

    :raises ModelFamilyNotKnownError: no family is registered as ``name``.
    :raises InternalError: the entry point cannot be imported, or is not a family of this name.
    """
    here = registered_here(FAMILIES_GROUP) if families is None else families
    if name in here:
        return here[name]
    if families is not None:
        raise ModelFamilyNotKnownError(name, f" The families of this loader: {', '.join(sorted(families))}.")

    entry = _entry_points().get(name)
    if entry is None:
        raise ModelFamilyNotKnownError(name, did_you_mean(name, {*here, *_entry_points()}))

    return _load(entry)


def family_of_model_type(model_type: str, architectures: Collection[str] = ()) -> Family[Any, Any] | None:
    """Return the family that reads checkpoints of this Hugging Face ``model_type``, or ``None``.

    Families that list the type take precedence over one that reads all model types.

    :param architectures: the value of the key of that name in the file, for types that several families share.
    """
    families, unknown = [], []
    for name in sorted({*registered_here(FAMILIES_GROUP), *_entry_points()}):
        try:
            families.append(get_family(name))
        except TorchNotFoundError as error:
            unknown.append(error)
    for family in families:
        if family.lists(model_type, architectures):
            return family

    if unknown:  # one of them may list the type
        raise unknown[0]

    return next((family for family in families if family.reads_other_model_types), None)


@lru_cache(maxsize=1)
def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in registered(FAMILIES_GROUP)}


@lru_cache(maxsize=256)
def _load(entry: EntryPoint) -> Family[Any, Any]:
    try:
        with needs_torch(f"The model family {entry.name!r}"):
            family = entry.load()
    except TorchNotFoundError:
        raise
    except Exception as error:
        raise InternalError(
            f"The model family {entry.name!r} is registered as {entry.value!r}, which cannot be imported: {error}"
        ) from error

    if not isinstance(family, Family) or family.name != entry.name:
        raise InternalError(
            f"The model family {entry.name!r} is registered as {entry.value!r}, which must be a Family of "
            f"that name, but is {family!r}."
        )

    return family
