"""The construction of modules: on the meta device, split over gangs, and filled with tensors."""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lading.errors import InternalError, ModelConfigError, NotSupportedError
from lading.gangs import Gangs
from lading.models.family import Family, check_config_type
from lading.models.pipeline import modules_of_other_dtype, parameter_names
from lading.models.targets import Targets, is_distributed, targets_of
from lading.planning.box import Box
from lading.transfer.dtypes import TORCH_DTYPES

if TYPE_CHECKING:
    from lading.models.placements import DTensorFactory

log = logging.getLogger("lading")


def build_on_meta(family: Family[Any, Any], config: Any) -> Module:
    """Build the module on the meta device, with parameters in float32 whatever the defaults of this process.

    :raises ModelConfigError: the values of ``config`` are inconsistent (also a ``ValueError``).
    """
    with _default_dtype(torch.float32), gc_disabled(), torch.device("meta"):
        try:
            built = family.build(config)
        except ValueError as error:
            # The values come from cards and architectures, so the mistake is more likely theirs than the family's.
            raise ModelConfigError(family.name, str(error)) from error

    if not isinstance(built, family.model_kls):
        raise InternalError(
            f"The {family.name} family must build a {family.model_kls.__name__}, but built a {type(built).__name__}."
        )
    module: Module = built

    return module


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable the garbage collector inside the block."""
    # Thousands of new objects trigger a collection of everything that torch imported, which takes ten builds' time.
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
    """Create this rank's part of a new model with random parameters, or of one on the meta device.

    Each parameter is drawn whole from a generator that is seeded by its name and a number from torch's generator on the
    first rank, and then sliced, so that the model does not depend on the gangs.

    :raises NotSupportedError: the family does not support ``meta``; ``gangs.tp`` does not divide a size, or
        ``gangs.ep × gangs.tp`` the experts; or ``gangs.pp`` has more ranks than the model has layers.
    :raises GangError: the arguments differ between ranks.
    """
    check_config_type(config, family)
    gangs.root.same((family.name, config, dtype, meta), "family, configuration, dtype and meta")
    if meta and not family.supports_meta:
        raise NotSupportedError(
            f"Models of the {family.name} family cannot be created on the meta device. Create it on the CPU."
        )

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

    # A pipeline stage is initialized as a part of the whole model, which has the names and depths of all layers.
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
    """Initialize the parameters and persistent buffers named in ``dtypes``; return this rank's part of each.

    All ranks of ``gangs`` make this call with the same arguments.

    :param model: the whole model, on the meta device.
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

    drawn = int(torch.randint(1 << 62, (), device="cpu"))  # on all ranks, so that their generators advance alike
    seed = gangs.root.first(lambda: drawn)
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        columns = zip(targets.names, targets.shapes, targets.boxes, strict=True)
        return {name: part(name, shape, box, dtypes[name]) for name, shape, box in columns if name in dtypes}


def _seed(device: torch.device, seed: int, name: str) -> None:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    number = int.from_bytes(digest[:8], "little", signed=True)
    if device.type == "cpu":
        torch.default_generator.manual_seed(number)
    else:
        with device:
            torch.get_device_module(device).manual_seed(number)


def other_dtypes(
    module: Module, family: Family[Any, Any], config: Any, dtype: torch.dtype | None, *, sdp: int
) -> Mapping[str, torch.dtype]:
    """Return the dtypes of the tensors of ``module``, whole and on the meta device, that are not ``dtype``.

    :param sdp: the number of ranks that shard parameters. Parameters that are gathered together must have one dtype: a
        parameter in a module with others then gets the dtype of the model, and a warning is logged.
    """
    if family.dtypes is None or dtype is None:
        return {}
    others = family.dtypes(module, config, dtype)
    if sdp == 1 or family.parallel_plan(config).units is None:
        return others

    held = {name for part in modules_of_other_dtype(module, others) for name in parameter_names(module, part)}
    cast = others.keys() & dict(module.named_parameters(remove_duplicate=False)).keys() - held
    if cast:
        log.warning(
            "%s keeps %s in a dtype of their own, but parameters that are sharded together must have one: they are "
            "loaded as %s",
            *(type(module).__name__, ", ".join(sorted(cast)[:5]) + ("…" if len(cast) > 5 else ""), dtype),
        )

    return {name: own for name, own in others.items() if name not in cast}


def split(module: Module, family: Family[Any, Any], config: Any, gangs: Gangs, *, dtype: torch.dtype | None) -> Targets:
    """Split ``module``, which is on the meta device, over ``gangs``; return all of its tensors with this rank's boxes.

    :param dtype: the dtype, as for :func:`targets_of`.

    :raises NotSupportedError: ``gangs.tp`` does not divide a size of the configuration, or ``gangs.ep × gangs.tp`` the
        experts; or ``gangs.pp`` has more ranks than the model has layers.
    """
    others = other_dtypes(module, family, config, dtype, sdp=gangs.sdp.size)
    whole = None if gangs.pp.size == 1 else targets_of(module, dtype=dtype, others=others)
    if gangs.root.size > 1:
        from lading.models.parallelize import parallelize  # this import takes half a second

        parallelize(module, family, config, gangs, others)
    own = targets_of(module, dtype=dtype, others=others)

    return own if whole is None else whole.on_stage(own)


def assign(module: Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> int:
    """Assign tensors to the module; a tied parameter stays one object under all of its names.

    :param tensors: the tensors by their first name; for a ``DTensor``, the part of this rank.

    :returns: the bytes that were copied: FSDP pads a part that is smaller than that of the first rank.
    """
    parts: DTensorFactory | None = None
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
                from lading.models.placements import DTensorFactory  # this import takes half a second

                parts = DTensorFactory()
            state[name] = parts.placed_as(tensor, own)
        else:
            state[name] = Parameter(tensor, own.requires_grad) if isinstance(own, Parameter) else tensor

    module.load_state_dict(state, strict=False, assign=True)

    with torch.no_grad():  # otherwise autograd tracks each part as a view
        # Keyed by the first name, although a pipeline stage may hold the parameter under another name only.
        held = {aliases.get(name, name): own.to_local() for name, own in state.items() if is_distributed(own)}

    return sum(part.nbytes for name, part in held.items() if part.data_ptr() != tensors[name].data_ptr())


def reset_buffers(
    module: Module, family: Family[Any, Any], config: Any, device: torch.device, dtype: torch.dtype
) -> None:
    """Compute the buffers that no checkpoint holds, such as rotary frequencies.

    :param dtype: the dtype of the model.

    :raises InternalError: a tensor of the module is still on the meta device afterwards.
    """
    for part in module.modules():
        reset = getattr(part, "reset_non_persistent_buffers", None)
        if reset is None:
            continue
        if signature(reset).parameters:
            reset(device)
        else:  # as in fairseq2, where the buffers are on their device by then
            for name in part._non_persistent_buffers_set:
                if (buffer := part._buffers[name]) is not None:
                    part._buffers[name] = torch.empty_like(buffer, device=device)
            reset()
    if family.reset_buffers is not None:
        family.reset_buffers(module, config, device, dtype)

    left = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    if left:
        raise InternalError(
            f"{type(module).__name__} leaves {', '.join(left)} on the meta device. Modules with non-persistent buffers "
            "must implement `reset_non_persistent_buffers(device)`, or without `device` if it computes them in place."
        )
