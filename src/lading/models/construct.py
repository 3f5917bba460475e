"""Modules without memory, and how they come by it."""

from __future__ import annotations

import gc
import hashlib
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lading.errors import InternalError, ModelConfigError, NotSupportedError
from lading.formats.manifest import Manifest
from lading.gangs import Gangs
from lading.models.family import Family
from lading.models.pipeline import apart_modules, own_names
from lading.models.targets import Targets, is_distributed, targets_of
from lading.planning.box import Box
from lading.planning.rules import Route
from lading.transfer.dtypes import DTYPE_NAMES, TORCH_DTYPES

if TYPE_CHECKING:
    from lading.models.placements import Parts

log = logging.getLogger("lading")


def check_config_type(config: Any, family: Family[Any, Any]) -> None:
    """:raises TypeError: ``config`` is not of the family's configuration class."""
    if not isinstance(config, family.config_kls):
        raise TypeError(
            f"`config` must be of type {family.config_kls.__name__}, the configuration of the {family.name} family, "
            f"but is of type {type(config).__name__}"
        )


def build_on_meta(family: Family[Any, Any], config: Any) -> Module:
    """The module without memory. Parameters are float32 on the meta device, whatever the defaults of this process.

    :raises ModelConfigError: the values of ``config`` make no model together (also a ``ValueError``).
    """
    with _default_dtype(torch.float32), no_collection(), torch.device("meta"):
        try:
            built = family.build(config)
        except ValueError as error:
            # Cards and architectures state such values, so it is a mistake of theirs before it is one of the family's.
            raise ModelConfigError(family.name, str(error)) from error

    if not isinstance(built, family.kls):
        raise InternalError(
            f"The {family.name} family is expected to build a {family.kls.__name__}, but built a "
            f"{type(built).__name__}."
        )
    module: Module = built

    return module


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from running."""
    # Thousands of new objects start a collection, which goes through all that torch has imported: ten times the build.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def create_model(family: Family[Any, Any], config: Any, *, gangs: Gangs, dtype: torch.dtype, meta: bool) -> Module:
    """The part of a new model with random parameters that this rank owns, or one without memory.

    Each parameter is drawn whole, by itself, from a generator that is seeded by torch's seed on the first rank and the
    parameter's name, and then cut: the same model comes of any gangs.

    :raises NotSupportedError: ``meta``, and the family cannot; a size does not divide over ``gangs.tp``; or there are
        more ranks in ``gangs.pp`` than layers.
    :raises GangError: the ranks do not all ask for the same.
    """
    check_config_type(config, family)
    gangs.root.same((family.name, config, dtype, meta), "family, configuration, dtype and meta")
    if meta and not family.supports_meta:
        raise NotSupportedError(f"Models of the {family.name} family cannot be made on the meta device.")

    module = build_on_meta(family, config)
    targets = split(module, family, config, gangs, dtype=dtype)
    dtypes = [TORCH_DTYPES[own or ""] for own in targets.dtypes]

    if meta:
        empty = {
            name: torch.empty(box.sizes, dtype=own, device="meta")
            for name, box, own in zip(targets.names, targets.boxes, dtypes, strict=True)
        }
        assign(module, empty, targets.aliases)
        return module

    # A stage draws what it holds as a part of the model that it was cut from, which tells names and depths.
    model = module if gangs.pp.size == 1 else build_on_meta(family, config)
    assign(
        module,
        init_missing(model, family, config, targets, dict(zip(targets.names, dtypes, strict=True)), gangs),
        targets.aliases,
    )
    reset_buffers(module, family, config, gangs.root.device, dtype)

    return module


def init_missing(
    model: Module,
    family: Family[Any, Any],
    config: Any,
    targets: Targets,
    dtypes: Mapping[str, torch.dtype],
    gangs: Gangs,
) -> dict[str, Tensor]:
    """New numbers for the parameters and persistent buffers of ``dtypes``, of each the part that this rank owns.

    All ranks of ``gangs`` call this alike.

    :param model: on the meta device, all of it.
    """
    device = gangs.root.device

    def part(name: str, shape: tuple[int, ...], box: Box, own: torch.dtype) -> Tensor:
        if box.numel == 0:
            return torch.empty(box.sizes, dtype=own, device=device)
        whole = torch.empty(shape, dtype=own, device=device)
        _seed(device, seed, name)
        family.init(model, config, name, whole)
        cut = tuple(slice(start, end) for start, end in zip(box.starts, box.ends, strict=True))

        return whole if box.covers(shape) else whole[cut].clone(memory_format=torch.contiguous_format)

    with _own_random_state(device):
        seed = gangs.root.first(torch.initial_seed)
        columns = zip(targets.names, targets.shapes, targets.boxes, strict=True)
        return {name: part(name, shape, box, dtypes[name]) for name, shape, box in columns if name in dtypes}


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Leave torch's generators as they were found."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        yield


def _seed(device: torch.device, seed: int, name: str) -> None:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    number = int.from_bytes(digest[:8], "little", signed=True)
    if device.type == "cpu":
        torch.default_generator.manual_seed(number)
    else:
        with device:
            torch.get_device_module(device).manual_seed(number)


def parallelize(
    module: Module, family: Family[Any, Any], config: Any, gangs: Gangs, apart: Collection[str] = ()
) -> None:
    """Split ``module``, which is on the meta device, over ``gangs`` as the family's plan says; see
    :mod:`lading.models.parallelize`, which is imported only where there is something to split.

    :param apart: names of tensors that are of another dtype than the model.

    :raises NotSupportedError: a size of the configuration does not divide over ``gangs.tp``, or there are more ranks
        in ``gangs.pp`` than layers.
    """
    if gangs.root.size > 1:
        from lading.models.parallelize import parallelize

        parallelize(module, family, config, gangs, apart)


def other_dtypes(
    module: Module, family: Family[Any, Any], config: Any, dtype: torch.dtype | None, *, sdp: int
) -> Mapping[str, torch.dtype]:
    """Return the dtypes of those tensors of ``module``, all of it and on the meta device, that are not of ``dtype``.

    :param sdp: ranks that shard parameters. Those that are gathered together have to be of one dtype: a parameter
        that lies in a module with others is of the dtype of the model then, and the log says so.
    """
    if family.dtypes is None or dtype is None:
        return {}
    others = family.dtypes(module, config, dtype)
    if sdp == 1 or family.parallel_plan(config).units is None:
        return others

    held = {name for part in apart_modules(module, others) for name in own_names(module, part)}
    cast = others.keys() & dict(module.named_parameters(remove_duplicate=False)).keys() - held
    if cast:
        log.warning(
            "%s keeps %s in a dtype of their own, but parameters that are sharded together must be of one: they are "
            "loaded as %s",
            *(type(module).__name__, ", ".join(sorted(cast)[:5]) + ("…" if len(cast) > 5 else ""), dtype),
        )

    return {name: own for name, own in others.items() if name not in cast}


def split(module: Module, family: Family[Any, Any], config: Any, gangs: Gangs, *, dtype: torch.dtype | None) -> Targets:
    """As :func:`parallelize`; returns all tensors of the whole module, each with the part that this rank owns.

    :param dtype: as :func:`targets_of` takes it.
    """
    others = other_dtypes(module, family, config, dtype, sdp=gangs.sdp.size)
    whole = None if gangs.pp.size == 1 else targets_of(module, dtype=dtype, others=others)
    parallelize(module, family, config, gangs, others)
    own = targets_of(module, dtype=dtype, others=others)

    return own if whole is None else whole.held_by(own)


def settle_dtypes(targets: Targets, routed: Route, manifest: Manifest, *, sdp: int) -> list[str]:
    """The dtype in memory of each routed tensor: the one asked for, or the checkpoint's own.

    Parameters that are gathered together have to be of one dtype: where ``sdp`` ranks shard them, the checkpoint's
    most common one stands for all that it could be of. Buffers are not sharded.
    """
    free = [targets.dtypes[i] is None and targets.names[i] in targets.parameters for i in routed.targets]
    own = [manifest.dtypes[t] for t in routed.tensors]

    if sdp > 1:
        elements = _elements(targets, routed, manifest, only=targets.parameters)
        if len(elements) > 1:
            common = max(elements, key=elements.__getitem__)
            log.warning(
                "the checkpoint holds weights as %s, but parameters that are sharded together must be of one dtype: "
                "all are loaded as %s, the most common one",
                ", ".join(sorted(elements)),
                common,
            )
            own = [common if is_free else dtype for is_free, dtype in zip(free, own, strict=True)]

    return [targets.dtypes[i] or dtype for i, dtype in zip(routed.targets, own, strict=True)]


def dtypes_of_drawn(targets: Targets, routed: Route, manifest: Manifest) -> dict[str, torch.dtype]:
    """The dtype in memory of what the checkpoint lacks: the one asked for, or the checkpoint's most common one."""
    if not routed.drawn:
        return {}

    common = DTYPE_NAMES[common_dtype(targets, routed, manifest)]
    own = dict(zip(targets.names, targets.dtypes, strict=True))

    return {name: TORCH_DTYPES[own[name] or common] for name in routed.drawn}


def common_dtype(targets: Targets, routed: Route, manifest: Manifest) -> torch.dtype:
    """Return the most common dtype of the checkpoint, of what may be of any."""
    elements = _elements(targets, routed, manifest)

    return TORCH_DTYPES[max(elements, key=elements.__getitem__, default="F32")]


def _elements(
    targets: Targets, routed: Route, manifest: Manifest, only: Collection[str] | None = None
) -> dict[str, int]:
    """Elements by the dtype of the checkpoint, of what may be of any.

    :param only: names of the targets that count; default: all.
    """
    elements: dict[str, int] = {}
    for i, tensor in zip(routed.targets, routed.tensors, strict=True):
        if targets.dtypes[i] is None and (only is None or targets.names[i] in only):
            dtype = manifest.dtypes[tensor]
            elements[dtype] = elements.get(dtype, 0) + math.prod(targets.shapes[i])

    return elements


def assign(module: Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> int:
    """Give the module its tensors; a tied parameter stays one object under all of its names.

    :param tensors: by the first name of each; of a ``DTensor`` the part that this rank owns.

    :returns: the bytes of what was copied on the way: a part that is smaller than that of the first rank, which FSDP
        pads to be of equal size.
    """
    parts: Parts | None = None
    state: dict[str, Tensor] = {}
    for name, own in module.state_dict(keep_vars=True).items():
        first = aliases.get(name, name)
        if first not in tensors:
            continue  # extra state
        if first in state:
            state[name] = state[first]
            continue
        tensor = tensors[first]
        if is_distributed(own):
            if parts is None:
                from lading.models.placements import Parts  # which takes half a second to import

                parts = Parts()
            state[name] = parts.placed_as(tensor, own)
        else:
            state[name] = Parameter(tensor, own.requires_grad) if isinstance(own, Parameter) else tensor

    module.load_state_dict(state, strict=False, assign=True)

    with torch.no_grad():  # else each part is a view that autograd keeps account of
        # By the first name, which a stage of a pipeline may have under another one only.
        held = {aliases.get(name, name): own.to_local() for name, own in state.items() if is_distributed(own)}

    return sum(part.nbytes for name, part in held.items() if part.data_ptr() != tensors[name].data_ptr())


def reset_buffers(
    module: Module, family: Family[Any, Any], config: Any, device: torch.device, dtype: torch.dtype
) -> None:
    """Compute the buffers that no checkpoint holds, such as rotary frequencies.

    :param dtype: of the model.

    :raises InternalError: something of the module is still on the meta device afterwards.
    """
    for part in module.modules():
        reset = getattr(part, "reset_non_persistent_buffers", None)
        if reset is not None:
            reset(device)
    if family.reset_buffers is not None:
        family.reset_buffers(module, config, device, dtype)

    left = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    if left:
        raise InternalError(
            f"{type(module).__name__} leaves {', '.join(left)} without memory. Modules with non-persistent buffers "
            "must implement `reset_non_persistent_buffers(device)`."
        )
