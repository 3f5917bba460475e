"""Export of models as Hugging Face repositories, from a checkpoint of any format or from a model in memory.

Parameters have the names of Hugging Face checkpoints, so they are written as a load reads them, except that stacked
experts become separate tensors, as published checkpoints have them. A repository is created completely or not at all,
and at most one tensor, or a few small ones, is in memory at a time: also in an object store, where each shard is
uploaded as it is made, without a copy on this machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from lading.cards.card import AssetCard
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.store import AssetStore, get_asset_store
from lading.checkpoints.adapter import Adapter
from lading.checkpoints.checkpoint import Checkpoint
from lading.checkpoints.extra_files import TOKENIZER_JSON, TOKENIZER_NAMES, companions, files_beside
from lading.checkpoints.fetch import fetch_checkpoint
from lading.checkpoints.names import as_path, find_card
from lading.checkpoints.verification import (
    Verify,
    finish_verification,
    prepare_verification,
    require_mode,
    verify_whole,
)
from lading.errors import NotSupportedError, PolicyError
from lading.formats.config_json import CONFIG_NAME
from lading.formats.folder import INDEX_NAME, some_names
from lading.formats.safetensors_writer import Entry, Writer, index_of
from lading.gangs import Gang, Gangs, create_fake_gangs
from lading.models.construct import build_on_meta, other_dtypes
from lading.models.dtype import dtypes_of_others, model_dtype, resolve_dtypes
from lading.models.family import Family, check_config_type, get_family
from lading.models.fit import fit, report_fit
from lading.models.merge import Merger
from lading.models.resolve import ResolveOptions, arch_config, resolve_model
from lading.models.targets import is_distributed, targets_of
from lading.models.tensors import DigestCollector, read_tensors
from lading.models.ties import different_copies, require_equal_copies
from lading.models.tokenizers.tokenizer import Tokenizer
from lading.operations.destination import Destination, Place, new_place, open_destination, place_of, require_new
from lading.operations.export_layout import (
    Part,
    batches,
    check_shard_size,
    config_values,
    elements_by_dtype,
    files_of,
    files_of_stages,
    published,
    torch_name,
)
from lading.operations.register import register_model, require_own_name
from lading.planning.box import Box
from lading.planning.composition import Source, cut
from lading.system.display import counted, human_bytes, human_count, representation
from lading.system.progress import byte_bar
from lading.transfer.dtypes import DTYPE_NAMES, TORCH_DTYPES, parse_dtype

if TYPE_CHECKING:
    from tqdm import tqdm

SHARD_SIZE = 5_000_000_000
"""The default for the most bytes of a file, as the hub recommends."""

_STEP = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """The result of an export."""

    name: str
    """The name of the card, the path of the checkpoint, or the class of the model."""
    family: str
    folder: Path | str
    """The folder, or its address in an object store."""
    files: Mapping[str, int]
    """The sizes of the files in bytes, by name."""
    tensors: int
    parameters: int
    """The number of elements of all tensors."""
    dtypes: Mapping[str, int]
    """The number of elements of each dtype, the most frequent first."""
    dropped: tuple[str, ...] = ()
    """Tensors of the checkpoint that the model does not use, and that were not written."""

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def __repr__(self) -> str:
        return representation(
            self,
            f"{self.name} in {self.folder}",
            counted(self.tensors, "tensor"),
            f"{human_count(self.parameters)} parameters",
            f"{human_bytes(self.bytes)} in {counted(len(self.files), 'file')}",
            f"{counted(len(self.dropped), 'tensor')} dropped" if self.dropped else "",
        )


def convert_checkpoint(
    target: AssetCard | str | Path,
    folder: Path | str,
    *,
    arch: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str = "keep",
    shard_size: int = SHARD_SIZE,
    drop: bool = False,
    stacked: bool = False,
    restrict: bool = True,
    progress: bool = True,
    verify: Verify = "auto",
    store: CardStore | None = None,
) -> ExportReport:
    """Write the checkpoint of a model, of any supported format, as a Hugging Face repository.

    The ``config.json`` is that of the checkpoint, if it describes the same model; else it is made from the
    configuration. The tokenizer's files are copied.

    :param target: as ``load_model`` takes it; likewise ``revision``.
    :param folder: the folder to create, which must be empty or not exist, or one of an object store, such as
        ``"s3://bucket/folder"``. It is created completely or not at all (:mod:`lading.operations.destination`).
    :param arch: the architecture, as ``"family/architecture"``, of a checkpoint at a path without a ``config.json``.
    :param dtype: the dtype of floating-point tensors, see ``load_model``; ``"keep"`` keeps that of each tensor.
    :param shard_size: the most bytes of a file, unless a single tensor has more.
    :param drop: whether to leave out trained tensors that a load ignores by a rule of the family, such as the tower of
        another modality, instead of refusing the checkpoint. Buffers that the model computes are always left out.
    :param stacked: whether to write the experts of a layer together, as transformers 5 has them in memory; by default
        each is written as tensors of its own, as publishers do.
    :param restrict: see :func:`lading.formats.index`; for a path.
    :param progress: whether to show a progress bar on stderr.
    :param verify: ``"auto"`` verifies files that the catalog does not know as verified in their current state, while
        they are read; ``"always"`` verifies all files, ``"never"`` none. A checkpoint at a path has no digests.

    :raises FileExistsError: ``folder`` exists, and is not an empty folder.
    :raises NotSupportedError: the checkpoint is quantized or of no known family, no ``config.json`` can describe it, or
        ``verify`` is ``"always"`` for a path.
    :raises ModelNotKnownError: it is not a card, a path or a repository of the hub.
    :raises ModelCheckpointError: the checkpoint is damaged, does not fit the configuration, or differs from the
        published or recorded digests.
    :raises PolicyError: the checkpoint has trained tensors that the model does not use, and ``drop`` is not set.
    :raises RefusedPickleError: unpickling it would import something that a state dict does not need.
    :raises ValueError: ``arch`` is given for a card, or has another form; ``shard_size`` is not positive; or ``verify``
        is unknown.
    :raises CheckpointNotFoundError: the checkpoint does not exist (also a ``FileNotFoundError``).
    :raises FetchError: the checkpoint is remote, and cannot be fetched.
    :raises OSError: the disk is full, or cannot be written.
    """
    place = place_of(folder)
    require_new(place)  # before hours of fetching
    check_shard_size(shard_size)
    require_mode(verify)
    chosen = parse_dtype(dtype)

    family = config = None
    if arch is not None:
        target = as_path(target) or find_card(target, store)
        if not isinstance(target, Path):
            raise ValueError("`arch` is only for a checkpoint at a path, as a card names its own")
        family, config = _of_architecture(arch, store)
    options = ResolveOptions(revision=revision, restrict=restrict, progress=progress, accept_others=verify == "never")
    model = resolve_model(target, store, family=family, config=config, options=options)
    name, family, config, checkpoint, store = model.name, model.family, model.config, model.checkpoint, model.store

    asked = model_dtype(chosen, checkpoint, store=store)
    module = build_on_meta(family, config)
    others = other_dtypes(module, family, config, asked, sdp=1)
    # config.json describes these targets: it cannot say that tied parameters are stored separately.
    described = targets = targets_of(module, dtype=asked, others=others)
    adapters = model.adapters
    match = fit(checkpoint, targets, family, config, adapters)
    dropped = report_fit(match).dropped
    if not drop:
        _require_no_loss(match.routed.unneeded, checkpoint, family)
    if store is not None:
        checkpoint = fetch_checkpoint(checkpoint, store, settings=store.settings, progress=progress)
    if family.untie is not None and (untied := different_copies(checkpoint, match)):
        family.untie(module, untied)
        targets = targets_of(module, dtype=asked, others=others)
        match = fit(checkpoint, targets, family, config, adapters)

    routed, replaced = match.routed, match.merge.replaced
    dtypes = resolve_dtypes(match, sdp=1)
    entries = [
        Entry(name=targets.names[i], dtype=d, shape=targets.shapes[i])
        for i, d in zip(routed.targets, dtypes, strict=True)
    ]
    sources = {targets.names[target]: source for target, source in routed.sources()}
    own = dtypes_of_others(match, [*replaced.values()])
    added = [
        Entry(name=name, dtype=DTYPE_NAMES[own[name]], shape=targets.shapes[target])
        for target, name in replaced.items()
    ]

    if model.card is None or store is None:
        beside: Mapping[str, Path] = files_beside(Path(name))
    else:
        beside = companions(checkpoint, model.card, store, progress=progress)
    expected = prepare_verification(checkpoint, store, verify, match.block_dims, progress=progress)
    witness = None if expected is None else DigestCollector(checkpoint.manifest, expected.dims)
    values = config_values(family, config, described, [*entries, *added], beside)
    if family.untie is None:  # else the copies were compared above
        require_equal_copies(checkpoint, match)
    here = [] if store is None else _here(adapters, store, verify, progress=progress)
    merger = Merger(match=match, base=checkpoint, adapters=here)

    with new_place(place) as new, open_destination(new) as destination:
        destination.require_space(sum(entry.nbytes for entry in (*entries, *added)))
        order = sorted(range(len(entries)), key=routed.tensors.__getitem__)  # as they lie in the files
        rules = () if stacked else family.published(config)
        parts = published([*(entries[i] for i in order), *added], rules)
        entries = [*parts]
        shards = files_of(entries, shard_size)
        with byte_bar(sum(entry.nbytes for entry in entries), "write", shown=progress) as bar:
            for file, shard in shards.items():
                _copy(destination, file, shard, parts, merger, sources, bar, witness)
        if expected is not None and witness is not None:
            finish_verification(
                checkpoint, expected, witness.digests(), store, create_fake_gangs("cpu").root, progress=progress
            )
        _finish(destination, shards, values, beside)
        return replace(_report(name, family, place, destination, entries), dropped=dropped)


def export_model(
    model: Module,
    family: Family[Any, Any] | str,
    config: Any,
    folder: Path | str,
    *,
    gangs: Gangs | None = None,
    dtype: torch.dtype | str | None = None,
    shard_size: int = SHARD_SIZE,
    beside: Path | str | None = None,
    tokenizer: Path | str | Tokenizer | Any = None,
    register: str | None = None,
    stacked: bool = False,
) -> ExportReport:
    """Write a model in memory as a Hugging Face repository.

    With ``gangs``, all ranks make the same call. They write the files in turn, to a folder that all of their hosts
    share; each tensor is gathered when its file is written, and no rank holds more than one.

    :param family: a family, or the name of one.
    :param config: the configuration of the model.
    :param folder: the folder to create, as :func:`convert_checkpoint` takes it.
    :param gangs: the gangs that hold the model; default: this process holds all of it.
    :param dtype: the dtype of floating-point tensors, also by its name, such as ``"bf16"``; default, or ``"keep"``:
        their own.
    :param shard_size: the most bytes of a file, unless a single tensor has more.
    :param beside: a folder from which to copy the tokenizer, and ``config.json`` if it describes the model.
    :param tokenizer: a tokenizer in place of that one: of transformers or of tokenizers, also as
            :func:`lading.load_tokenizer` returns it, or a folder with its files.
    :param register: the name under which the catalog gets a card for the folder, as by
        :func:`lading.register_model`; default: none.
    :param stacked: as :func:`convert_checkpoint` takes it.

    :raises FileExistsError: ``folder`` exists, and is not an empty folder.
    :raises NotSupportedError: no ``config.json`` can describe the model, or the gangs are simulated.
    :raises TypeError: ``config`` or ``model`` is not of the family's class, ``dtype`` is not a dtype, or ``tokenizer``
        cannot be saved.
    :raises AssetCardError: ``register`` is not a valid name, or that of a card from another source.
    :raises ValueError: ``config`` describes other parameters than ``model`` has, ``shard_size`` is not positive, or
        ``dtype`` is ``"auto"``.
    :raises GangError: another rank failed, passed other arguments, or writes to another file system.
    :raises OSError: the disk is full, or cannot be written.
    """
    family = get_family(family) if isinstance(family, str) else family
    place = place_of(folder)
    check_config_type(config, family)
    check_shard_size(shard_size)
    chosen = parse_dtype("keep" if dtype is None else dtype)
    if chosen == "auto":
        raise ValueError('`dtype` must be a dtype or "keep", as a model in memory has no other dtype of its own')
    asked_dtype = chosen if isinstance(chosen, torch.dtype) else None
    if not isinstance(model, family.model_kls):
        raise TypeError(f"`model` must be a {family.model_kls.__name__}, but is of type {type(model).__name__}")
    root = (gangs or create_fake_gangs("cpu")).root
    if root.size > 1 and root.channel is None:
        raise NotSupportedError(
            "A model of simulated gangs cannot be exported: its other parts do not exist. Export it without `gangs`."
        )
    root.same(
        (
            family.name,
            config,
            chosen,
            shard_size,
            str(place),
            None if beside is None else str(beside),
            register,
            stacked,
        ),
        "family, configuration, dtype, shard size, folder, `beside`, `register` and `stacked`",
    )

    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    mine = targets_of(model, dtype=asked_dtype)
    whole = targets_of(build_on_meta(family, config), dtype=asked_dtype)
    # Each stage has a copy of a parameter that is tied across stages; it is written under its first name.
    held = {
        name: Entry(name=name, dtype=asked or DTYPE_NAMES[tensors[name].dtype], shape=shape)
        for name, asked, shape in zip(mine.names, mine.dtypes, mine.shapes, strict=True)
        if name not in whole.aliases
    }
    stages: dict[tuple[Entry, ...], list[int]] = {}
    for rank, entries_of_rank in enumerate(root.gather_objects(tuple(held.values()))):
        stages.setdefault(entries_of_rank, []).append(rank)
    entries = [entry for stage in stages for entry in stage]
    if {entry.name: entry.shape for entry in entries} != dict(zip(whole.names, whole.shapes, strict=True)):
        raise ValueError("`config` must be the one that `model` was made with, but describes other parameters")
    rules = () if stacked else family.published(config)
    parts = published(entries, rules)
    entries = [*parts]
    shards, writers = files_of_stages(
        {tuple(published(stage, rules)): ranks for stage, ranks in stages.items()}, shard_size
    )

    saved = tokenizer.model if isinstance(tokenizer, Tokenizer) else tokenizer

    def begin() -> tuple[Place, Mapping[str, Path], Mapping[str, object]]:
        if register is not None:
            require_own_name(register, get_asset_store())
        files = {} if beside is None else files_beside(Path(beside))
        if saved is not None:
            own = {} if (source := _folder_of_tokenizer(saved)) is None else files_beside(source)
            files = {name: file for name, file in files.items() if name not in TOKENIZER_NAMES}
            files |= {name: file for name, file in own.items() if name in TOKENIZER_NAMES}
        values = config_values(family, config, whole, entries, files)

        return stack.enter_context(new_place(place)), files, values

    def finish() -> ExportReport:
        _require_here(destination, new, writers, root)
        _save_tokenizer(saved, destination)
        _finish(destination, shards, values, files)
        report = _report(family.model_kls.__name__, family, place, destination, entries)
        stack.close()
        if register is not None:
            register_model(register, place)

        return report

    with ExitStack() as stack:  # an exception removes what each rank has written
        new, files, values = root.first(begin)
        destination = stack.enter_context(open_destination(new))
        for file, shard in shards.items():
            with root.all_or_none():
                if parts[shard[0]].parameter.name in held:
                    _write_together(destination, file, shard, parts, tensors, writes=writers[file] == root.rank)

        return root.first(finish)


def _of_architecture(arch: str, store: CardStore | None) -> tuple[Family[Any, Any], Any]:
    family_name, slash, name = arch.partition("/")
    if not slash:
        raise ValueError(f"`arch` must be 'family/architecture', but is {arch!r}")
    family = get_family(family_name)

    return family, arch_config(name, family, open_store(store))


# --- tensors ----------------------------------------------------------------------------------------------------------


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _require_no_loss(trained: Sequence[str], checkpoint: Checkpoint, family: Family[Any, Any]) -> None:
    """Require that no trained tensors of the checkpoint would be left out.

    :raises PolicyError: there are such tensors.
    """
    if trained:
        raise PolicyError(
            f"{checkpoint.where}: expected only tensors that a model of the family {family.name} uses, found "
            f"{counted(len(trained), 'trained tensor')} that the conversion would lose: {some_names(sorted(trained))}. "
            "To leave them out, add `--drop` (in Python: `drop=True`)."
        )


def _here(adapters: Sequence[Adapter], store: AssetStore, verify: Verify, *, progress: bool) -> list[Checkpoint]:
    """Return the verified adapters with their files, after fetching missing ones."""
    found = []
    for adapter in adapters:
        here = fetch_checkpoint(adapter.checkpoint, store, settings=store.settings, progress=progress)
        verify_whole(here, store, verify, create_fake_gangs("cpu").root, progress=progress)
        found.append(here)

    return found


def _copy(
    destination: Destination,
    name: str,
    shard: Sequence[Entry],
    parts: Mapping[Entry, Part],
    merger: Merger,
    sources: Mapping[str, Source],
    bar: tqdm[Any],
    witness: DigestCollector | None,
) -> None:
    """Write a file from a checkpoint and its adapters, a few tensors at a time.

    :param sources: the sources of the parameters in the checkpoint, by name.
    :param witness: computes digests of the bytes that are read.
    """
    shapes = merger.base.manifest.shapes
    changed = {merger.match.targets.names[target] for target in merger.match.merge.changes}
    merged: dict[Entry, Tensor] = {}  # the parameters of a batch that adapters change, whole
    with destination.create(name, sum(entry.size for entry in shard)) as file, Writer(file, shard) as writer:
        for batch in batches(shard):
            needed = {entry: parts[entry].parameter for entry in batch if parts[entry].parameter.name in changed}
            merged = {parameter: merged[parameter] for parameter in needed.values() if parameter in merged}
            new = [parameter for parameter in dict.fromkeys(needed.values()) if parameter not in merged]

            wanted = {parameter: sources[parameter.name] for parameter in new if parameter.name in sources}
            for entry in batch:
                if entry not in needed:
                    wanted[entry] = cut(sources[parts[entry].parameter.name], shapes, parts[entry].box)
            dtypes = [entry.dtype for entry in wanted]
            read = read_tensors(merger.base, [*wanted.values()], dtypes, witness=witness)
            tensors = dict(zip(wanted, read, strict=True))
            for parameter in new:
                if parameter not in tensors:  # an adapter has it whole
                    tensors[parameter] = torch.empty(parameter.shape, dtype=TORCH_DTYPES[parameter.dtype])
                merged[parameter] = tensors[parameter]
            merger.merge_into({parameter.name: merged[parameter] for parameter in new})

            for entry in batch:
                own = _part(merged[needed[entry]], parts[entry].box) if entry in needed else tensors[entry]
                writer.write(_bytes(own))
                bar.update(entry.nbytes)


def _write_together(
    destination: Destination,
    name: str,
    shard: Sequence[Entry],
    parts: Mapping[Entry, Part],
    tensors: Mapping[str, Tensor],
    *,
    writes: bool,
) -> None:
    """Gather the parameters of a file on all ranks, one after another, and write them on one rank."""
    failed: Exception | None = None
    with ExitStack() as stack:
        writer: Writer | None = None
        try:
            if writes:
                file = stack.enter_context(destination.create(name, sum(entry.size for entry in shard)))
                writer = stack.enter_context(Writer(file, shard))
        except Exception as error:
            failed = error

        for parameter, entries in groupby(shard, lambda entry: parts[entry].parameter):
            whole = _whole(tensors[parameter.name])
            if writer is None or failed is not None:
                continue
            try:
                for entry in entries:
                    writer.write(_bytes(_part(whole, parts[entry].box).to(TORCH_DTYPES[entry.dtype])))
            except Exception as error:
                failed = error  # continue, as the other ranks wait for this one in the next gathering
        if failed is not None:
            raise failed


@torch.no_grad()
def _part(whole: Tensor, box: Box) -> Tensor:
    return whole[tuple(map(slice, box.starts, box.ends))]


@torch.no_grad()
def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_distributed(tensor) else tensor


# --- the rest of a repository -----------------------------------------------------------------------------------------


def _require_here(destination: Destination, place: Place, writers: Mapping[str, int], root: Gang) -> None:
    """Require that the files of all ranks are at ``place``.

    :raises NotSupportedError: a file that another rank wrote is on another file system.
    """
    here = destination.sizes()
    for file, rank in writers.items():
        if file not in here:
            raise NotSupportedError(
                f"{file} was written by rank {rank} on the host {root.hosts[rank]}, but is not in {place} on that of "
                "rank 0. Export to a folder on a file system that all hosts share."
            )


def _finish(
    destination: Destination,
    shards: Mapping[str, Sequence[Entry]],
    values: Mapping[str, object],
    beside: Mapping[str, Path],
) -> None:
    """Write the other files of a repository, last those that make it a checkpoint."""
    for name, path in beside.items():
        if name != CONFIG_NAME:
            _copy_file(path, destination, name)
    if len(shards) > 1:
        _write_json(index_of(shards), destination, INDEX_NAME)
    _write_json(values, destination, CONFIG_NAME)


def _write_json(values: Mapping[str, object], destination: Destination, name: str) -> None:
    data = f"{json.dumps(values, indent=2, ensure_ascii=False)}\n".encode()
    with destination.create(name, len(data)) as file:
        file.write(data)


def _copy_file(path: Path, destination: Destination, name: str) -> None:
    with path.open("rb") as original, destination.create(name, os.fstat(original.fileno()).st_size) as file:
        while data := original.read(_STEP):
            file.write(data)


def _folder_of_tokenizer(tokenizer: Any) -> Path | None:
    """Return the folder with the files of a tokenizer; ``None`` if it is an object that can save itself.

    :raises TypeError: it is neither.
    """
    if isinstance(tokenizer, str | Path):
        return Path(tokenizer)
    if callable(getattr(tokenizer, "save_pretrained", None)) or callable(getattr(tokenizer, "save", None)):
        return None

    raise TypeError(
        "`tokenizer` must be a tokenizer of transformers or of tokenizers, or a folder with its files, but is of type "
        f"{type(tokenizer).__name__}"
    )


def _save_tokenizer(tokenizer: Any, destination: Destination) -> None:
    """Write a tokenizer that is an object, as its library does."""
    if tokenizer is None or isinstance(tokenizer, str | Path):
        return
    with TemporaryDirectory(prefix="lading-") as temporary:
        folder = Path(temporary)
        if callable(save := getattr(tokenizer, "save_pretrained", None)):
            save(folder)
        else:
            tokenizer.save(str(folder / TOKENIZER_JSON))
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                _copy_file(path, destination, path.relative_to(folder).as_posix())


def _report(
    name: str, family: Family[Any, Any], place: Place, destination: Destination, entries: Sequence[Entry]
) -> ExportReport:
    dtypes = {torch_name(dtype): count for dtype, count in elements_by_dtype(entries).items()}

    return ExportReport(
        name=name,
        family=family.name,
        folder=place,
        files=destination.sizes(),
        tensors=len(entries),
        parameters=sum(dtypes.values()),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
    )
