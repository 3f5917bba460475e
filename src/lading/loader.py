"""The one conductor: from a card or a path to a model, each layer called once, top to bottom.

config → fetch → manifest → module on the meta device → targets → route → plan → execute → buffers → agreement.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from lading.card import AssetCard
from lading.catalog.store import AssetStore
from lading.checkpoint import Checkpoint, card_checkpoint, path_checkpoint, read_tensors
from lading.config import architecture_config, resolve_config
from lading.construct import assign, build_on_meta, check_config_type, parallelize, reset_buffers, settle_dtypes
from lading.errors import (
    AssetCardError,
    ModelArchitectureNotKnownError,
    ModelCheckpointMismatchError,
    NotSupportedError,
)
from lading.family import Family
from lading.gangs import Gangs
from lading.keymap import Route, route
from lading.transfer import fit
from lading.transfer.dtypes import DTYPE_NAMES
from lading.transfer.execute import execute
from lading.transfer.plan import Plan, Wanted, plan
from lading.transfer.targets import Targets, targets_of

log = logging.getLogger("lading")

DType = torch.dtype | Literal["auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load did."""

    name: str
    """Of the card, or the path."""
    family: str
    model_class: str
    device: str
    dtypes: Mapping[str, int]
    """Elements in memory by dtype, the most frequent first."""
    parameters: int
    """Elements in memory, tied parameters once."""
    tensors: int
    """Tensors of the checkpoint that were used."""
    shards: int
    bytes_read: int
    bytes_mapped: int
    reads: int
    """Reads after neighbours were joined."""
    phases: Mapping[str, float]
    """Seconds of each phase, in the order in which they ran."""

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


class _Clock:
    """Measures the phases of a load."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start


def model_config(card: AssetCard, family: Family[Any, Any], store: AssetStore) -> Any:
    """The configuration of a card: the defaults of the family, its architecture's numbers, the card's overrides.

    :raises AssetCardError: the card is of another family, names an architecture that is not known, or states
        overrides that do not fit.
    """
    check_family(card, family)

    architecture = None
    arch = card.maybe_get_field("model_arch")
    if arch is not None:
        try:
            architecture = store.architecture(arch.as_(str), family.name)
        except ModelArchitectureNotKnownError as error:
            raise AssetCardError(card.name, f"The field 'model_arch' of the card {card.name!r}: {error}") from None

    return resolve_config(card, architecture, family.config_kls)


def check_family(card: AssetCard, family: Family[Any, Any]) -> None:
    """:raises AssetCardError: the card is of another family."""
    stated = card.field("model_family").as_(str)
    if stated != family.name:
        raise AssetCardError(
            card.name,
            f"The card {card.name!r} is expected to be of the family {family.name!r}, but its `model_family` is "
            f"{stated!r}.",
        )


def arch_config(arch: str, family: Family[Any, Any], store: AssetStore) -> Any:
    """The configuration of an architecture.

    :raises ModelArchitectureNotKnownError: the family has none of this name.
    """
    return architecture_config(store.architecture(arch, family.name), family.config_kls)


def load_card(
    card: AssetCard,
    family: Family[Any, Any],
    store: Callable[[], AssetStore],
    *,
    gangs: Gangs,
    dtype: DType,
    config: Any = None,
    mmap: bool = False,
    progress: bool = True,
) -> tuple[Module, LoadReport]:
    """Load the model of a card. Only rank 0 of the root gang asks the catalog; the others are told."""
    clock = _Clock()

    def resolve() -> tuple[Any, Checkpoint]:
        with clock.phase("catalog"):
            open_store = store()
            check_family(card, family)
            resolved = model_config(card, family, open_store) if config is None else config

        with clock.phase("manifest"):
            return resolved, card_checkpoint(card, open_store)

    resolved, checkpoint = gangs.root.first(resolve)

    return _load(checkpoint, family, resolved, gangs, dtype, mmap, progress, clock)


def load_path(
    path: Path,
    family: Family[Any, Any],
    config: Any,
    *,
    gangs: Gangs,
    dtype: DType,
    mmap: bool = False,
    progress: bool = True,
) -> tuple[Module, LoadReport]:
    """Load the checkpoint at ``path``, of which the catalog is not asked."""
    clock = _Clock()
    with clock.phase("manifest"):
        checkpoint = gangs.root.first(lambda: path_checkpoint(path))

    return _load(checkpoint, family, config, gangs, dtype, mmap, progress, clock)


def _load(
    checkpoint: Checkpoint,
    family: Family[Any, Any],
    config: Any,
    gangs: Gangs,
    dtype: DType,
    mmap: bool,
    progress: bool,
    clock: _Clock,
) -> tuple[Module, LoadReport]:
    check_config_type(config, family)
    device = gangs.root.device
    manifest = checkpoint.manifest

    with clock.phase("build"):
        module = build_on_meta(family, config)
        parallelize(module, family, config, gangs)

    with clock.phase("plan"):
        targets = targets_of(module, dtype=None if dtype == "auto" else dtype)
        routed = route(manifest.names, targets.names, family.rules(config), targets.aliases)
        _check_fit(checkpoint, targets, routed)
        order = array("I", routed.targets)
        wanted = Wanted(
            tensors=routed.tensors,
            boxes=[targets.boxes[i] for i in order],
            dtypes=settle_dtypes(targets, routed, manifest, gangs),
        )
        planned = plan(manifest, wanted, mapped=mmap and device.type == "cpu")

    with clock.phase("read"):
        shapes = [(box.sizes, name) for box, name in zip(wanted.boxes, wanted.dtypes, strict=True)]
        tensors = execute(planned, checkpoint.files, shapes, device=device, progress=progress)
        by_name = {targets.names[i]: tensor for i, tensor in zip(order, tensors, strict=True)}
        _check_tied(checkpoint, targets, routed, by_name)

    with clock.phase("assemble"):
        assign(module, by_name, targets.aliases)
        reset_buffers(module, device)

    gangs.root.agree()
    report = _report(checkpoint, family, module, device, by_name, routed, planned, clock)
    log.info(
        "loaded %s: %d parameters, %.3f GB read in %d reads, %.3f s",
        report.name,
        report.parameters,
        report.bytes_read / 1e9,
        report.reads,
        report.seconds,
    )

    return module, report


def _check_fit(checkpoint: Checkpoint, targets: Targets, routed: Route) -> None:
    """
    :raises ModelCheckpointMismatchError: with all problems together.
    :raises NotSupportedError: the weights are quantised.
    """
    tensor = fit.quantised(checkpoint.manifest, targets, routed)
    if tensor is not None:
        dtype = checkpoint.manifest.dtypes[checkpoint.manifest.names.index(tensor)]
        raise NotSupportedError(
            f"The checkpoint at {checkpoint.path} holds the weight {tensor!r} as {dtype}: it is quantised, which "
            "lading does not load. Use the checkpoint in its original precision."
        )

    problems = fit.problems(checkpoint.manifest, targets, routed)
    if problems:
        shown = problems[:20]
        more = [f"… and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise ModelCheckpointMismatchError(
            checkpoint.path,
            f"The checkpoint at {checkpoint.path} does not fit the configuration of {checkpoint.name}: "
            f"{len(problems)} problem{'s' if len(problems) > 1 else ''}. Check the architecture and the overrides.\n  "
            + "\n  ".join(shown + more),
            problems,
        )


def _check_tied(checkpoint: Checkpoint, targets: Targets, routed: Route, loaded: Mapping[str, Tensor]) -> None:
    """A tied parameter may be in the checkpoint under several names, if all of them hold the same."""
    manifest = checkpoint.manifest
    for target, tensor in routed.duplicates:
        name = targets.names[target]
        mine = loaded[name]
        (other,) = read_tensors(checkpoint, [tensor], [DTYPE_NAMES[mine.dtype]])
        if not torch.equal(mine.cpu(), other):
            raise ModelCheckpointMismatchError(
                checkpoint.path,
                f"The configuration of {checkpoint.name} ties {manifest.names[tensor]!r} to {name!r}, but the "
                f"checkpoint at {checkpoint.path} holds different values for them. Load it with "
                "`tied_embeddings: false`.",
                [f"tied, but different: {manifest.names[tensor]} and {name}"],
            )


def _report(
    checkpoint: Checkpoint,
    family: Family[Any, Any],
    module: Module,
    device: torch.device,
    loaded: Mapping[str, Tensor],
    routed: Route,
    planned: Plan,
    clock: _Clock,
) -> LoadReport:
    dtypes: dict[str, int] = {}
    for tensor in loaded.values():
        name = str(tensor.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + tensor.numel()

    mapped = sum(t.nbytes for t, home in zip(loaded.values(), planned.homes, strict=True) if home >= 0)

    return LoadReport(
        name=checkpoint.name,
        family=family.name,
        model_class=type(module).__name__,
        device=str(device),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        parameters=sum(dtypes.values()),
        tensors=len(routed.tensors) + len(routed.duplicates),
        shards=len(checkpoint.manifest.shards),
        bytes_read=planned.read_bytes,
        bytes_mapped=mapped,
        reads=planned.num_reads,
        phases=dict(clock.phases),
    )
