"""Sidecars made: the matrices of a checkpoint that tensor parallelism cuts by their columns, written once more, cut."""

from __future__ import annotations

import json
import math
import os
from array import array
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lading.cards.card import AssetCard
from lading.catalog.checkpoints.record import record_checkpoint, record_digests, record_files
from lading.catalog.records import Check, LocalCopy
from lading.catalog.store import AssetStore, get_asset_store
from lading.checkpoints.checkpoint import Checkpoint
from lading.checkpoints.fetch import fetch_checkpoint
from lading.checkpoints.locate import card_checkpoint
from lading.checkpoints.recording import require_writable
from lading.checkpoints.sidecar import Sidecar, blocks_of, identity_of, metadata_of, sidecar_uri
from lading.checkpoints.sidecar_lookup import find_sidecar
from lading.checkpoints.verification import remedy, shard_digest
from lading.errors import CorruptModelCheckpointError, DigestMismatchError, InternalError, NotSupportedError
from lading.formats.digests import Digests
from lading.formats.manifest import BITS
from lading.formats.safetensors import index_file
from lading.formats.safetensors_writer import METADATA, Entry, header_of
from lading.models.construct import build_on_meta
from lading.models.family import Family
from lading.models.fit import block_dims, match, report_fit, require_fit
from lading.models.resolve import resolve_model
from lading.models.targets import Targets, targets_of
from lading.operations.verify import verify_model
from lading.planning.box import Box
from lading.planning.plan import Wanted, plan
from lading.planning.rules import Route
from lading.sources.cache import Cache
from lading.sources.disk import advised, require_space
from lading.sources.partial import sweep, temporary_file
from lading.system.filesystem import FileStat
from lading.system.progress import byte_bar
from lading.system.settings import Settings
from lading.transfer.execute import execute, hash_checkpoint
from lading.transfer.files import ShardFile
from lading.transfer.hashing import Hasher


@dataclass(frozen=True, slots=True, kw_only=True)
class RepackReport:
    """What :func:`repack_model` made, or found."""

    name: str
    tp: int
    path: Path
    tensors: int
    """Of the checkpoint, that the file holds the blocks of."""
    bytes: int
    """Of all of them."""
    checkpoint_bytes: int
    """Of all tensors of the checkpoint."""
    written: bool
    """Whether it was made; it may have been there already."""

    @property
    def share(self) -> float:
        """Of the checkpoint's bytes, those that are in the file as well."""
        return self.bytes / self.checkpoint_bytes


def repack_model(name: str, *, tp: int, progress: bool = True, store: AssetStore | None = None) -> RepackReport:
    """Write what ``tp`` ranks of tensor parallelism read of a model by columns to a file of its own, cut beforehand.

    The file is in lading's cache, beside the checkpoint, which stays as it is; loads over gangs of this ``tp`` then use
    it, so that a rank reads no more than it keeps. The checkpoint is fetched where it is elsewhere, and verified where
    it was not yet; what is written was checked on the way. Nothing is done where the file is there and true.

    :param name: of a card.
    :param tp: how many ranks; 2 at least.
    :param progress: show a bar on stderr.

    :raises ValueError: ``tp`` is less than 2.
    :raises AssetNotFoundError: no card has that name.
    :raises NotSupportedError: the family has no plan for tensor parallelism, a size does not divide over ``tp``, or
        ranks would cut nothing by columns.
    :raises ModelCheckpointMismatchError: the checkpoint does not fit the model's architecture.
    :raises DigestMismatchError: the checkpoint is not the one that was published or recorded.
    :raises FetchError: it is elsewhere, and cannot be fetched.
    :raises CatalogError: the catalog cannot be written.
    :raises OSError: the disk is full, or the cache cannot be written.
    """
    if tp < 2:
        raise ValueError(f"`tp` must be at least 2, but is {tp}: a single rank cuts nothing")
    store = store or get_asset_store()
    require_writable(store)
    card = store.retrieve_card(name)
    model = _Model.of(card, store, tp, progress=progress)

    cache = Cache(Settings.from_environment().cache_dir)
    with cache.lock(Path(cache.repacked(sidecar_uri(model.checkpoint.uri, tp))).stem):
        checkpoint = _verified(model.checkpoint, name, store, progress=progress)
        found = find_sidecar(checkpoint, store, tp)
        if isinstance(found, Sidecar) and found.tensors == model.tensors:
            return model.report(found.file.path, written=False)

        digests = _digests(checkpoint, model, store, progress=progress)
        path = _write(checkpoint, digests, model, cache, store, progress=progress)

    return model.report(path, written=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What is to be cut."""

    checkpoint: Checkpoint
    family: Family[Any, Any]
    config: Any
    targets: Targets
    routed: Route
    tp: int
    tensors: array[int]
    """Positions in the manifest of the matrices that ranks cut by their columns; type code ``I``."""

    @classmethod
    def of(cls, card: AssetCard, store: AssetStore, tp: int, *, progress: bool) -> _Model:
        model = resolve_model(card, store, progress=progress)
        family, config, checkpoint = model.family, model.config, model.checkpoint
        targets = targets_of(build_on_meta(family, config), dtype=None)
        parallel_plan = family.parallel_plan(config)
        if parallel_plan.tensor is None:
            raise NotSupportedError(
                f"Models of the {family.name} family have no plan for tensor parallelism, so there is nothing of "
                f"{card.name} to cut for {tp} ranks."
            )
        parallel_plan.check(tp)

        manifest = checkpoint.manifest
        routed = match(manifest, targets, family, config)
        require_fit(report_fit(manifest, targets, routed, family=family), path=checkpoint.where, name=card.name)
        tensors = sorted(
            tensor
            for i, (target, tensor) in enumerate(zip(routed.targets, routed.tensors, strict=True))
            if i not in routed.composed and parallel_plan.shard_dim(targets.names[target]) == 1
            if math.prod(manifest.shapes[tensor]) and BITS[manifest.dtypes[tensor]] % 8 == 0
        )
        for tensor in tensors:
            if (cols := manifest.shapes[tensor][1]) % tp:
                raise NotSupportedError(
                    f"{manifest.names[tensor]} has {cols} columns, which {tp} ranks cannot cut evenly. Use a `tp` that "
                    "divides them."
                )
        if not tensors:
            raise NotSupportedError(
                f"The checkpoint of {card.name} holds no tensor that {tp} ranks cut by columns as it is stored, so "
                "there is nothing to repack: each rank reads one run of bytes of each tensor already."
            )

        return cls(
            checkpoint=checkpoint,
            family=family,
            config=config,
            targets=targets,
            routed=routed,
            tp=tp,
            tensors=array("I", tensors),
        )

    def report(self, path: Path, *, written: bool) -> RepackReport:
        manifest = self.checkpoint.manifest

        return RepackReport(
            name=self.checkpoint.name,
            tp=self.tp,
            path=path,
            tensors=len(self.tensors),
            bytes=sum(map(manifest.nbytes, self.tensors)),
            checkpoint_bytes=manifest.total_bytes,
            written=written,
        )


def _verified(checkpoint: Checkpoint, name: str, store: AssetStore, *, progress: bool) -> Checkpoint:
    """The checkpoint on this machine, seen to be the right one in the state that it is in."""
    checkpoint = fetch_checkpoint(checkpoint, store, progress=progress)
    if checkpoint.trusted:
        return checkpoint

    report = verify_model(name, progress=progress, store=store)
    for check in report.checks:
        if check.result == "mismatch":
            raise DigestMismatchError(
                check.path,
                f"{check.path} is not the file that was published or recorded: expected {check.expected}, found "
                f"{check.found}. Nothing was made of it. {report.hint}",
                expected=check.expected or "",
                found=check.found or "",
            )
    verified = card_checkpoint(store.retrieve_card(name), store)
    if not verified.trusted or not verified.manifest.tensors_equal(checkpoint.manifest):
        raise CorruptModelCheckpointError(
            checkpoint.where,
            f"{checkpoint.where} changed while it was verified. Repack it again when nothing writes to it any more.",
        )

    return verified


def _digests(checkpoint: Checkpoint, model: _Model, store: AssetStore, *, progress: bool) -> Digests:
    """The digests of the tensors, taken and recorded where files were known by their SHA-256 alone."""
    manifest = checkpoint.manifest
    digests = store.digests(checkpoint.uri, manifest)
    if digests is not None and all(map(digests.is_complete, model.tensors)):
        return digests

    dims = block_dims(manifest, model.family, model.config, model.targets, model.routed)
    digests = hash_checkpoint(manifest, checkpoint.here(), dims, progress=progress)
    record_digests(store.database, uri=checkpoint.uri, manifest=manifest, digests=digests)

    return digests


def _write(
    checkpoint: Checkpoint, digests: Digests, model: _Model, cache: Cache, store: AssetStore, *, progress: bool
) -> Path:
    manifest, tensors, tp = checkpoint.manifest, model.tensors, model.tp
    uri = sidecar_uri(checkpoint.uri, tp)
    roots = {manifest.names[i]: digest.root for i in tensors if (digest := digests.of(manifest, i)) is not None}
    identity = identity_of(manifest, tensors, roots)
    if identity is None:
        raise InternalError(f"the digests of all tensors of {checkpoint.name} should be known, but are not")
    entries = [Entry(name=name, dtype=dtype, shape=shape) for name, dtype, shape in blocks_of(manifest, tensors, tp)]
    count = len(tensors)
    header = header_of(entries, {**METADATA, **metadata_of(checkpoint.uri, checkpoint.revision, tp, identity)})
    offsets = list(accumulate((entry.nbytes for entry in entries), initial=len(header)))

    path = cache.repacked(json.dumps([uri, identity]))
    with advised("LADING_CACHE_DIR"):
        require_space(cache.folder, offsets[-1])
        sweep(cache.tmp, older_than=0, kind="repack")  # which nobody takes up
        with (
            temporary_file(cache.tmp, "repack") as (file, written),
            byte_bar(offsets[-1], "repack", shown=progress) as bar,
        ):
            file.write(header)
            for place, i in enumerate(tensors):
                matrix = _matrix(checkpoint, digests, i).view(torch.uint8)
                for k, block in enumerate(matrix.chunk(tp, dim=1)):
                    file.seek(offsets[k * count + place])
                    file.write(block.contiguous().view(-1).numpy().data)
                bar.update(matrix.nbytes)
            file.flush()
            cache.put_repacked(file.fileno(), written, path)

    try:
        _record(checkpoint, uri, path, cache, store, progress=progress)
    except BaseException:
        cache.remove_repacked(path)
        raise

    return path


def _matrix(checkpoint: Checkpoint, digests: Digests, i: int) -> Tensor:
    """A tensor as it is stored, checked as it is read: bytes that went bad since must not get a good name again."""
    part = checkpoint.manifest.take([i])
    shape, dtype = part.shapes[0], part.dtypes[0]
    wanted = Wanted(tensors=[0], boxes=[Box.whole(shape)], dtypes=[dtype])
    planned = plan(part, wanted)
    hasher = Hasher(part, [digests.dims[i]], planned, wanted)
    (tensor,) = execute(planned, checkpoint.here(), [(shape, dtype)], hasher=hasher)

    expected, found = digests.of(checkpoint.manifest, i), hasher.digests().of(part, 0)
    if expected is None or found != expected:
        path = checkpoint.here()[part.shard_ids[0]].path
        raise DigestMismatchError(
            path,
            f"{path}: {part.names[0]} is not the tensor that was verified before, so nothing was made of it. "
            f"{remedy(checkpoint)}",
            expected="" if expected is None else expected.root,
            found="" if found is None else found.root,
        )

    return tensor


def _record(checkpoint: Checkpoint, uri: str, path: Path, cache: Cache, store: AssetStore, *, progress: bool) -> None:
    """Tell the catalog of a sidecar; what it knew of another one in its place is forgotten, and the file removed."""
    manifest, stat = index_file(path), FileStat.from_stat(os.stat(path))
    digests = hash_checkpoint(manifest, [ShardFile(path=path, stat=stat)], progress=progress)
    file = manifest.shards[0].name
    before = store.checkpoint(uri)

    record_checkpoint(
        store.database,
        uri=uri,
        manifest=manifest,
        copies=[LocalCopy(file=file, path=path, stat=stat, kind="cache")],
        revision=checkpoint.revision,
        accept=True,
    )
    record_digests(store.database, uri=uri, manifest=manifest, digests=digests)
    # The last word: before it, no load takes the file for verified.
    check = Check(
        file=file, path=path, stat=stat, method="blake3", expected=None, found=shard_digest(manifest, digests, 0)
    )
    record_files(store.database, uri=uri, checks=[check])

    for copy in () if before is None else before.copies:
        if copy.path != path:
            cache.remove_repacked(copy.path)
