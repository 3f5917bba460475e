"""The application of a parallel plan: a module on the meta device becomes the part that this rank owns.

Tensor and expert parallelism use the styles in :mod:`lading.models.tensor_parallel`, which torch's
:func:`~torch.distributed.tensor.parallel.parallelize_module` applies, fully sharded data parallelism
:func:`~torch.distributed.fsdp.fully_shard`, and a pipeline stage fits
:class:`~torch.distributed.pipelining.PipelineStage`. Replicas are plain copies.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Module, Parameter

from lading.errors import InternalError, NotSupportedError
from lading.gangs import Gang, Gangs
from lading.gangs.torch_private import shards_over_two_axes
from lading.models.family import Family
from lading.models.parallel_plan import ParallelPlan, Split, matches
from lading.models.pipeline import cut_to_stage, is_tied_outside, modules_of_other_dtype, tied_names
from lading.models.tensor_parallel import SharedHeads, SplitExperts, SplitStyle

log = logging.getLogger("lading")

_REPLICATED: Placement = Replicate()

_LAYOUTS: Mapping[Split, tuple[Placement, Placement]] = {
    Split.COLUMN: (_REPLICATED, Shard(-1)),
    Split.ROW: (Shard(-1), _REPLICATED),
    Split.KEY_VALUE: (_REPLICATED, Shard(-1)),
    Split.VOCABULARY: (_REPLICATED, _REPLICATED),
    Split.LOGITS: (_REPLICATED, _REPLICATED),
    Split.HEADS: (Shard(2), Shard(2)),
    Split.FEATURES: (Shard(-1), Shard(-1)),
    Split.REPLICATED: (_REPLICATED, _REPLICATED),
}
"""The placements of the inputs and outputs of a module on the ranks."""

_UNIT_SPLITS = (Split.VOCABULARY, Split.LOGITS, Split.HEADS, Split.REPLICATED)
"""The splits of modules that FSDP may gather separately; FSDP warns about each such module that returns a view."""


def parallelize(
    module: Module, family: Family[Any, Any], config: Any, gangs: Gangs, other_dtype_names: Collection[str] = ()
) -> None:
    """Split ``module``, which is on the meta device, over ``gangs`` by the plan of the family.

    Modules of other stages of ``gangs.pp`` become ``None``. Parameters that are split become ``DTensor``s. A tied
    parameter stays one object under all of its names on this rank.

    :param other_dtype_names: the names of tensors with another dtype than the model. Modules of such parameters are
        gathered separately, because FSDP gathers only parameters of one dtype together.

    :raises NotSupportedError: ``gangs.tp`` does not divide a size of the configuration, or ``gangs.ep`` the experts, or
        ``gangs.pp`` has more ranks than the model has layers; or this torch does not shard experts over all three axes.
    """
    plan = family.parallel_plan(config)
    for axis, size, served in (
        ("tp", gangs.tp.size, plan.tensor is not None),
        ("ep", gangs.ep.size, plan.has_experts),
        ("sdp", gangs.sdp.size, plan.units is not None),
        ("pp", gangs.pp.size, plan.stages is not None),
    ):
        if size > 1 and not served:
            _log_ignored(family.name, axis)

    if gangs.pp.size > 1 and plan.stages is not None:
        cut_to_stage(module, plan.stages, gangs.pp, family=family.name)

    plan.check(gangs.tp.size, gangs.ep.size)
    if plan.has_experts and min(gangs.sdp.size, gangs.ep.size, gangs.tp.size) > 1 and not shards_over_two_axes():
        raise NotSupportedError(
            "`sdp`, `ep` and `tp` together need a newer torch, whose FSDP shards parameters on two other axes. Update "
            "torch, or use `tp=1` or `ep=1`."
        )
    if gangs.tp.size > 1 or (gangs.ep.size > 1 and plan.has_experts):
        _split(module, plan, gangs)

    if gangs.sdp.size > 1 and plan.units is not None:
        mesh = mesh_of(gangs.sdp if gangs.rdp.size == 1 else gangs.dp)
        units = {name: unit for pattern in plan.units for name, unit in _modules(module, pattern).items()}
        ties = tied_names(module)
        # FSDP would untie a parameter of a unit from its other names outside of the unit.
        units = {name: unit for name, unit in units.items() if not is_tied_outside(name, ties)}
        units |= {name: module.get_submodule(name) for name in modules_of_other_dtype(module, other_dtype_names)}
        # Units of both kinds may be nested: FSDP needs the inner ones first.
        stacked = {id(p) for name, p in module.named_parameters() if plan.split_of(_owner(name)) is Split.EXPERTS}

        def placement(parameter: Parameter) -> Shard | None:
            return Shard(_dim_of_experts(parameter.shape, gangs.sdp.size)) if id(parameter) in stacked else None

        for name in sorted(units, key=lambda name: name.count("."), reverse=True):
            fully_shard(units[name], mesh=mesh, shard_placement_fn=placement)
        fully_shard(module, mesh=mesh, shard_placement_fn=placement)


def placements(
    plan: ParallelPlan,
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    parameters: Container[str],
    *,
    sdp: int,
    ep: int,
    tp: int,
) -> list[tuple[Placement, Placement, Placement]]:
    """Predict how :func:`parallelize` places tensors on the axes ``sdp``, ``ep`` and ``tp``.

    For very many parameters, torch takes minutes to place them. On all other axes tensors are replicated.

    :param names: the names of the tensors in the state dict; for a tied one, the first.
    :param shapes: the shapes of the tensors.
    :param parameters: the names among these that are parameters, not buffers.

    :raises NotSupportedError: ``tp``, or ``ep × tp``, does not divide a size of the configuration.
    """
    plan.check(tp, ep)
    sharded = sdp > 1 and plan.units is not None
    found: list[tuple[Placement, Placement, Placement]] = []
    for name, shape in zip(names, shapes, strict=True):
        of_tp = of_ep = of_sdp = _REPLICATED
        if name in parameters:
            module, _, leaf = name.rpartition(".")
            split = plan.split_of(module)
            if split is Split.EXPERTS and ep > 1:
                of_ep = Shard(0)
            if split is not None and tp > 1:
                of_tp = _placement(split, leaf, plan, tp)
            if sharded:
                dim = _dim_of_experts(shape, sdp) if split is Split.EXPERTS else 0
                # FSDP splits the part that the other axes leave, although its own comes first.
                factor = (ep if of_ep == Shard(dim) else 1) * (tp if of_tp == Shard(dim) else 1)
                of_sdp = _StridedShard(dim, split_factor=factor) if factor > 1 else Shard(dim)
        found.append((of_sdp, of_ep, of_tp))

    return found


def mesh_of(gang: Gang) -> DeviceMesh:
    """Return the device mesh of a gang.

    :raises InternalError: the gang has no process group, and therefore no mesh.
    """
    if gang.mesh is None:
        raise InternalError(f"a gang of {gang.size} ranks must have a device mesh, but has none")

    return gang.mesh


@lru_cache(maxsize=256)
def _log_ignored(family: str, axis: str) -> None:
    log.warning(
        "models of the %s family have no plan for the axis %s: its ranks hold copies of one another", family, axis
    )


def _split(module: Module, plan: ParallelPlan, gangs: Gangs) -> None:
    ties = tied_names(module)
    tp = gangs.tp.size
    styles: dict[Split, SplitStyle] = {}
    experts: SplitExperts | None = None
    # Inner modules first: what remains of an outer one is its own parameters.
    for name, part in reversed(list(module.named_modules())):
        split = plan.split_of(name)
        if split is Split.EXPERTS:
            experts = experts or SplitExperts(plan.num_experts, _mesh_of_experts(gangs))
            experts.apply(part)
        elif split is not None and tp > 1:
            if split not in styles:
                styles[split] = _style(split, plan, tp)
            # One by one: torch would match each name with all modules.
            parallelize_module(part, mesh_of(gangs.tp), styles[split])

    for first, *others in ties:
        for name in others:
            _set_parameter(module, name, module.get_parameter(first))


def _mesh_of_experts(gangs: Gangs) -> DeviceMesh:
    """Return the mesh of the ranks that together hold all experts."""
    if gangs.tp.size == 1:
        return mesh_of(gangs.ep)
    if gangs.ep.size == 1:
        return mesh_of(gangs.tp)

    return mesh_of(gangs.root)["ep", "tp"]


def _dim_of_experts(shape: Sequence[int], sdp: int) -> int:
    """Return the dim along which FSDP shards stacked experts.

    A rank can have fewer experts than its gang has ranks, so it is the first of the others that divides evenly, as FSDP
    requires of them.
    """
    return next((dim for dim in range(1, len(shape)) if shape[dim] % sdp == 0), 0)


def _owner(parameter: str) -> str:
    """Return the name of the module with a parameter."""
    return parameter.rpartition(".")[0]


def _modules(module: Module, pattern: str) -> Mapping[str, Module]:
    """Return the modules that ``pattern`` matches, possibly none: a model can lack some of its modules."""
    return {name: part for name, part in module.named_modules() if matches(pattern, name)}


def _set_parameter(module: Module, name: str, parameter: Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)


def _style(split: Split, plan: ParallelPlan, tp: int) -> SplitStyle:
    def placement(leaf: str) -> Placement:
        return _placement(split, leaf, plan, tp)

    if split is Split.KEY_VALUE and tp > plan.num_key_value_heads:
        return SharedHeads(placement, plan.num_key_value_heads)

    return SplitStyle(placement, *_LAYOUTS[split], as_view=split not in _UNIT_SPLITS)


def _placement(split: Split, leaf: str, plan: ParallelPlan, tp: int) -> Placement:
    """Return the placement of a parameter of a split module, by the last component of its name."""
    match split:
        case Split.ROW:
            return Shard(1) if leaf == "weight" else _REPLICATED
        case Split.KEY_VALUE:
            return Shard(0) if tp <= plan.num_key_value_heads else _REPLICATED
        case Split.COLUMN | Split.VOCABULARY | Split.LOGITS | Split.EXPERTS:
            return Shard(0)
        case Split.HEADS | Split.FEATURES | Split.REPLICATED:
            return _REPLICATED
