"""The load of a model from a card, an address or a path, which calls each layer once, top to bottom.

config → manifest → module on the meta device → targets → route → plan → fetch → execute → verify → merge of adapters →
buffers → agreement.

A load fetches nothing before the manifest shows that the checkpoint fits. In a gang, rank 0 alone reads the catalog,
one rank of each host fetches, and each reads its part; a failure on one rank raises on all.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from lading.cards.card import AssetCard, StreamMode, stream_mode
from lading.catalog.store import AssetStore
from lading.checkpoints.adapter import Adapter
from lading.checkpoints.checkpoint import Checkpoint
from lading.checkpoints.fetch import fetch_checkpoint, share
from lading.checkpoints.streaming import (
    files_to_stream,
    finish_streamed,
    open_stream,
    prepare_streamed,
    require_vouched,
    taking_sha256,
)
from lading.checkpoints.verification import Verify, finish_verification, prepare_verification, verify_whole
from lading.gangs import Gangs
from lading.models.construct import (
    assign,
    build_on_meta,
    init_missing,
    reset_buffers,
    split,
)
from lading.models.dtype import common_dtype_of_targets, dtypes_of_others, model_dtype, resolve_dtypes
from lading.models.family import Family, check_config_type, get_family
from lading.models.fit import Match, fit, name_of
from lading.models.merge import Merger
from lading.models.report import Clock, LoadReport
from lading.models.resolve import ResolveOptions, resolve_model
from lading.models.targets import Targets
from lading.models.tensors import read_tensors
from lading.models.ties import are_same, different_copies, tied_mismatch_error
from lading.planning.block_scales import with_scales
from lading.planning.composition import Source, tensors_of
from lading.planning.plan import Wanted, plan
from lading.planning.rules import Route
from lading.system.settings import Settings
from lading.transfer.dtypes import DTYPE_NAMES, DType
from lading.transfer.mappings import NOTHING_AHEAD, Ahead, mapped_ahead, may_be_mapped
from lading.transfer.memory import create_arena
from lading.transfer.move import PlannedLoad, load_cooperatively, load_tensors

log = logging.getLogger("lading")

T = TypeVar("T")

_COMPARED = 4 << 20
"""The most elements of a copy to read at once for its comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The options of a load."""

    gangs: Gangs
    dtype: DType
    settings: Settings
    mmap: bool = False
    progress: bool = True
    verify: Verify = "auto"
    cooperative: bool = False
    """``True`` if the ranks of a host each read a part of the files, and exchange it."""
    stream: StreamMode | None = None
    """``True`` to read the files at their source; ``None``: as the card says."""
    revision: str | None = None
    """The revision of a repository, instead of the one that its address names."""
    restrict: bool = True
    """``restrict`` of :func:`lading.formats.index`; only for a path."""
    families: Mapping[str, Family[Any, Any]] | None = None
    """The families that a card may name; ``None`` for those that are registered."""

    @property
    def maps(self) -> bool:
        """``True`` if tensors stay in the files where possible."""
        return self.mmap and self.gangs.root.device.type == "cpu"

    @property
    def shows_progress(self) -> bool:
        """``True`` if this rank shows a bar."""
        return self.progress and self.gangs.root.rank == 0


class _Resolved(NamedTuple):
    """The model, as rank 0 resolves it for all ranks."""

    config: Any
    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    dtype: torch.dtype | None
    """``None`` for that of each tensor of the checkpoint."""
    stream: StreamMode
    """The card's field ``stream``."""


def load(
    target: AssetCard | str | Path,
    family: Family[Any, Any] | None,
    store: AssetStore | None,
    options: LoadOptions,
    *,
    config: Any = None,
) -> tuple[Module, LoadReport]:
    """Load the model of a card, a name, an address or a path. Rank 0 of the root gang resolves it for all ranks.

    :param family: the family that is asked for; default: that of the model.
    :param store: the catalog, which rank 0 alone opens; default: the default store.
    :param config: instead of the card's configuration, or of the one in ``config.json``.

    :raises TypeError: ``config`` is not of the family's class.
    """
    if family is not None and config is not None:
        check_config_type(config, family)
    clock = Clock()
    opened: AssetStore | None = None

    def resolve() -> tuple[str, _Resolved]:
        nonlocal opened
        with clock.phase("resolve"):
            model = resolve_model(
                target,
                store,
                family=family,
                config=config,
                families=options.families,
                options=ResolveOptions(
                    revision=options.revision,
                    restrict=options.restrict,
                    progress=options.progress,
                    accept_others=options.verify == "never",
                    fetches=options.stream is not True,
                ),
            )
            opened = model.store
            if model.contradictions:
                log.warning(_CONTRADICTED, model.name, "; ".join(model.contradictions))
            dtype = model_dtype(options.dtype, model.checkpoint, store=opened)
            stream = False if model.card is None else stream_mode(model.card)
            return model.family.name, _Resolved(model.config, model.checkpoint, model.adapters, dtype, stream)

    name, resolved = options.gangs.root.first(resolve)
    family = get_family(name, options.families) if family is None else family

    with _mapped_ahead(resolved.checkpoint, resolved.dtype, options) as ahead, ExitStack() as open_streams:
        return _load(resolved, family, opened, options, clock, ahead, open_streams)


_CONTRADICTED = (
    "%s: the card contradicts the config.json beside the weights, and the card counts: %s. Correct the card, or remove "
    "its `model_arch` and its overrides to use what the file says."
)


def agreed(gangs: Gangs, load: Callable[[], T]) -> T:
    """Return the result of ``load`` if it succeeds on every rank; else all ranks raise, naming the one that failed."""
    with gangs.root.all_or_none():
        return load()


def _mapped_ahead(
    checkpoint: Checkpoint, dtype: torch.dtype | None, options: LoadOptions
) -> AbstractContextManager[Ahead]:
    """Map the files while the model is built, if the load needs all of them and they are here."""
    if not options.maps or options.gangs.root.size > 1 or checkpoint.files is None:
        return nullcontext(NOTHING_AHEAD)

    name = None if dtype is None else DTYPE_NAMES[dtype]

    return mapped_ahead(checkpoint.files, may_be_mapped(checkpoint.manifest, name))


def _load(
    resolved: _Resolved,
    family: Family[Any, Any],
    store: AssetStore | None,
    options: LoadOptions,
    clock: Clock,
    ahead: Ahead,
    open_streams: ExitStack,
) -> tuple[Module, LoadReport]:
    config, checkpoint, adapters, dtype, by_card = resolved
    gangs, device, progress = options.gangs, options.gangs.root.device, options.shows_progress
    gangs.root.same(
        (config, options.dtype, options.verify, options.cooperative, options.stream),
        "configuration, dtype, verify, cooperative and stream",
    )
    hosts = len(set(gangs.root.hosts))
    manifest = checkpoint.manifest

    def fetch(checkpoint: Checkpoint) -> Checkpoint:
        return fetch_checkpoint(checkpoint, store, settings=options.settings, progress=progress)

    def bring(checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint with its files, on this machine or at their source."""
        if checkpoint.streamed is not None:
            return checkpoint
        files = None
        mode = by_card if options.stream is None else options.stream
        if mode is not False and not options.mmap:
            find = partial(files_to_stream, checkpoint, mode, settings=options.settings, hosts=hosts)
            files = gangs.root.first(partial(find, preferred=by_card is True))
        if files is None:
            return share(checkpoint, gangs.root, fetch)
        checkpoint, stream = open_stream(checkpoint, files, settings=options.settings, root=gangs.root)
        open_streams.callback(stream.stop)

        return checkpoint

    untied: tuple[str, ...] = ()
    while True:
        with clock.phase("build"):
            module = build_on_meta(family, config)
            kls = type(module)  # FSDP changes it
            if family.untie is not None:
                family.untie(module, untied)
            # All targets of the model, so that a checkpoint fits on all stages of a pipeline or on no stage.
            targets = split(module, family, config, gangs, dtype=dtype)

        with clock.phase("plan"):
            match = fit(checkpoint, targets, family, config, adapters)
            routed = match.routed
        if family.untie is None or untied or not routed.duplicates:
            break

        # Only the values show whether the model has one parameter or several.
        with clock.phase("fetch"):
            checkpoint = bring(checkpoint)
        with clock.phase("read"):
            untied = gangs.root.first(partial(different_copies, checkpoint, match))
        if not untied:
            break

    with clock.phase("plan"):
        order = array("I", routed.targets)
        wanted = with_scales(
            manifest,
            Wanted(
                tensors=routed.tensors,
                boxes=[targets.boxes[i] for i in order],
                dtypes=resolve_dtypes(match, sdp=gangs.sdp.size),
                composed=routed.composed,
            ),
        )
        planned = plan(manifest, wanted, mapped=options.maps)

    with clock.phase("fetch"):
        checkpoint = bring(checkpoint)
        added = [share(adapter.checkpoint, gangs.root, fetch) for adapter in adapters]
        # The ranks of a host that read together see all of its bytes.
        groups = hosts if options.cooperative else gangs.root.size
        dims_of = match.block_dims
        if checkpoint.streamed is None:
            prepare = partial(
                prepare_verification, checkpoint, store, options.verify, dims_of, ranks=groups, progress=progress
            )
        else:
            prepare = partial(
                prepare_streamed, checkpoint, store, options.verify, dims_of, planned, groups=groups, root=gangs.root
            )
        expected = gangs.root.first(prepare)

    with clock.phase("read"), taking_sha256(checkpoint, expected) as sha256:
        planned_load = PlannedLoad(
            manifest=manifest,
            wanted=wanted,
            plan=planned,
            files=checkpoint.readable(),
            dims=None if expected is None else expected.dims or None,
        )
        arena = create_arena(planned.arena_bytes, device, options.settings.huge_pages)
        require = None
        if checkpoint.streamed is not None and options.verify == "always":
            require = partial(require_vouched, checkpoint, expected)
        if options.cooperative:
            moved = load_cooperatively(planned_load, arena=arena, root=gangs.root, require=require, progress=progress)
        else:
            moved = load_tensors(planned_load, arena=arena, require=require, progress=progress, ahead=ahead)
        by_name = {targets.names[i]: tensor for i, tensor in zip(order, moved.tensors, strict=True)}
        if family.untie is None:  # otherwise all copies have been compared
            _check_tied(checkpoint, match, by_name)

    verified: bool | None = None
    if checkpoint.streamed is not None:
        with clock.phase("verify"):
            verified = finish_streamed(checkpoint, expected, moved, sha256, store, gangs.root)
    elif expected is not None and moved.digests is not None:
        with clock.phase("verify"):
            finish_verification(checkpoint, expected, moved.digests, store, gangs.root, progress=progress)

    if adapters:
        with clock.phase("merge"):
            for each in added:
                verify_whole(each, store, options.verify, gangs.root, progress=progress)
            replaced = match.merge.replaced
            own = dtypes_of_others(match, [*replaced.values()])
            for target, name in replaced.items():
                by_name[name] = torch.empty(targets.boxes[target].sizes, dtype=own[name], device=device)
            Merger(match=match, base=checkpoint, adapters=added).merge_into(by_name, progress=progress)

    with clock.phase("assemble"):
        drawn: dict[str, Tensor] = {}
        if missing := dtypes_of_others(match, routed.drawn):
            log.info("%s lacks %s: they are initialized as in a new model", checkpoint.name, ", ".join(missing))
            drawn = init_missing(build_on_meta(family, config), family, config, targets, missing, gangs)
        copied = assign(module, by_name | drawn, targets.aliases)
        reset_buffers(module, family, config, device, dtype or common_dtype_of_targets(match))

    loaded = _elements_by_dtype(by_name.values())
    stream = checkpoint.stream
    report = LoadReport(
        name=checkpoint.name,
        family=family.name,
        model_class=kls.__name__,
        device=str(device),
        dtypes=loaded,
        parameters=sum(loaded.values()),
        tensors=len({t for source in _sources(routed, targets) for t in tensors_of(source)}),
        shards=len(manifest.shards),
        bytes_read=moved.bytes_read if stream is None else stream.bytes_read,
        bytes_mapped=sum(
            t.nbytes
            for i, t, home in zip(order, moved.tensors, planned.homes, strict=False)  # scales come last
            if home >= 0 and i not in match.merge.changes
        ),
        bytes_copied=copied,
        reads=moved.reads if stream is None else stream.requests,
        streamed=stream is not None,
        verified=verified,
        pages=moved.pages,
        phases=dict(clock.phases),
        adapters=tuple(each.where for each in added),
        dropped=routed.unneeded,
    )
    log.info(
        "loaded %s: %d parameters, %.3f GB read in %d reads, %.3f s",
        report.name,
        report.parameters,
        report.bytes_read / 1e9,
        report.reads,
        report.seconds,
    )

    return module, report


def _check_tied(checkpoint: Checkpoint, match: Match, loaded: Mapping[str, Tensor]) -> None:
    """Check that the copies of a tied parameter in the checkpoint are equal to what was loaded."""
    for target, source, _ in match.copies():
        name, copy = match.targets.names[target], name_of(source, match.manifest)
        mine, box = loaded[name], match.targets.boxes[target]
        for slab in box.slabs(_COMPARED):
            part = mine if slab == box else mine[slab.starts[0] - box.starts[0] :][: slab.sizes[0]]
            (other,) = read_tensors(checkpoint, [source], [DTYPE_NAMES[mine.dtype]], boxes=[slab])
            if not are_same(part.cpu(), other):
                raise tied_mismatch_error(checkpoint, match.config, copy, name)


def _sources(routed: Route, targets: Targets) -> list[Source]:
    """Return all sources that this rank reads a part of, or that are empty."""
    read = [box.numel > 0 or 0 in shape for box, shape in zip(targets.boxes, targets.shapes, strict=True)]

    return [source for target, source in (*routed.sources(), *routed.duplicates) if read[target]]


def _elements_by_dtype(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Return the number of elements of each dtype, the most frequent first."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()

    return dict(counts.most_common())
