"""Checks of local files against published or recorded digests, without loading them."""

from __future__ import annotations

import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lading import formats
from lading.cards.adapters import adapter_refs
from lading.cards.card import AssetCard, CheckpointRef
from lading.catalog.checkpoints.record import last_digests, record_digests, record_files
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.records import HEADER, Check, CopyKind, LocalCopy
from lading.catalog.store import AssetStore
from lading.checkpoints.address import address_of
from lading.checkpoints.card_digests import with_digests
from lading.checkpoints.checkpoint import Checkpoint, LocalCheckpointFiles, header_checks, local_checkpoint
from lading.checkpoints.fetch import fetch_checkpoint
from lading.checkpoints.local_copies import best_copies
from lading.checkpoints.locate import card_checkpoint, index_checkpoint
from lading.checkpoints.names import find_card, path_title
from lading.checkpoints.pins import with_pins
from lading.checkpoints.verification import check_files, remedy, shard_digest
from lading.errors import (
    AssetCardError,
    CheckpointNotFoundError,
    CorruptModelCheckpointError,
    FetchError,
    InternalError,
    LadingError,
    ModelGatedError,
    NotSupportedError,
    TorchNotFoundError,
)
from lading.formats.digests import Digests, default_dims, differences, recorded
from lading.formats.folder import DISTRIBUTED_SUFFIX
from lading.formats.safetensors import index_file
from lading.formats.torch_save.archive import damaged_record
from lading.models.fit import match
from lading.models.resolve import ResolvedModel, resolve_model
from lading.models.shapes import targets_of_config
from lading.sources.hub.remove import revision_of
from lading.system.display import counted, representation
from lading.system.filesystem import FileStat
from lading.system.uris import path_uri, shown_uri, uri_path
from lading.transfer.files import ShardFile
from lading.transfer.hashing import hash_checkpoint

log = logging.getLogger("lading")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The result of a verification of a model's files."""

    name: str
    uri: str
    checks: tuple[Check, ...]
    """The last check of each file."""
    repaired: frozenset[str] = frozenset()
    """The wrong files that were fetched again."""
    hint: str = ""
    """Advice about wrong files."""
    different: tuple[str, ...] = ()
    """The tensors that are not those whose digests are published or recorded, before any repair."""
    published: str = ""
    """The document that publishes the digests of the tensors; empty without one."""
    unrecorded: str = ""
    """The reason that the catalog has no record of it; empty if it has."""

    @property
    def good(self) -> bool:
        return all(check.result != "mismatch" for check in self.checks)

    def __repr__(self) -> str:
        results = Counter(check.result for check in self.checks)

        return representation(
            self,
            self.name,
            counted(len(self.checks), "file"),
            *(f"{count} {result}" for result, count in results.items()),
            f"{len(self.repaired)} repaired" if self.repaired else "",
            f"not recorded: {self.unrecorded}" if self.unrecorded else "",
        )


def verify_model(
    name: AssetCard | str | Path,
    *,
    revision: str | None = None,
    repair: bool = False,
    progress: bool = True,
    store: CardStore | None = None,
) -> VerifyReport:
    """Check all bytes of the files of a model, and of its adapters, on this machine.

    This compares them with the published or recorded SHA-256; else with the digests of tensors that the first load
    recorded; and with those that the card publishes. It records unknown digests. Every check becomes a row;
    if the catalog cannot be written, this checks the files all the same.

    :param name: as ``load_model`` takes it; likewise ``revision``. A checkpoint at a path need not be in the catalog.
    :param repair: fetch wrong files again: those in lading's own cache, and in that of Hugging Face's libraries, whose
        ``hf_hub_download`` replaces them. This never replaces other files.
    :param progress: show a bar on stderr.

    :raises ModelNotKnownError: it is not a card, a path or a repository of the hub.
    :raises CheckpointNotFoundError: the checkpoint is not on this machine (of a path, also a ``FileNotFoundError``).
    :raises CorruptModelCheckpointError: the checkpoint at a path is verified for the first time, and is none.
    :raises NotSupportedError: ``repair`` for files outside of the caches.
    :raises FetchError: ``repair``, and the source cannot be reached.
    :raises CatalogError: the catalog is damaged, or another process holds it.
    """
    store = open_store(store)
    of = find_card(name, store, revision=revision, ask=False)
    report = _verify(of, store, repair=repair, progress=progress)
    for ref in () if isinstance(of, Path) else adapter_refs(of):
        adapter = _verify(ref.card, store, repair=repair, progress=progress)
        report = replace(
            report,
            checks=(*report.checks, *adapter.checks),
            repaired=report.repaired | adapter.repaired,
            hint=" ".join(filter(None, (report.hint, adapter.hint))),
            different=(*report.different, *adapter.different),
        )

    return report


def _verify(of: AssetCard | Path, store: AssetStore, *, repair: bool, progress: bool) -> VerifyReport:
    """Check the files of one checkpoint."""
    checkpoint, kinds = _known(of, store)
    checks, different = _checked(checkpoint, of, store, progress=progress)
    _record(checkpoint, kinds, checks, store)

    bad = [check for check in checks if check.result == "mismatch"]
    if bad and repair:
        _refuse_foreign(bad, kinds, checkpoint)
        # In lading's cache the state of a file may not show the damage.
        with _set_aside([check.path for check in bad if kinds[check.file] == "cache"]):
            repaired = fetch_checkpoint(
                replace(checkpoint, files=None), store, settings=store.settings, progress=progress
            )
        checks, _ = _checked(repaired, of, store, progress=progress)
        _record(repaired, kinds, checks, store)

    database = store.database
    return VerifyReport(
        name=checkpoint.name,
        uri=checkpoint.uri,
        checks=tuple(checks),
        repaired=frozenset(check.file for check in bad if repair),
        hint=remedy(checkpoint, files=len(bad)) if bad else "",
        different=tuple(different),
        published="" if checkpoint.published is None else checkpoint.published.shown,
        unrecorded="" if database.writable else f"the catalog {database.url} cannot be written",
    )


def _known(of: AssetCard | Path, store: AssetStore) -> tuple[Checkpoint, dict[str, CopyKind]]:
    """Return the checkpoint by the catalog's records, its files in their current state, and the owner of each."""
    if isinstance(of, Path):
        ref = CheckpointRef(uri=path_uri(of.absolute()), gated=False, info_url=None)
        name = title = path_title(of)
    else:
        ref, name, title = address_of(of), of.name, of.title
    path = uri_path(ref.uri)
    if path is not None:
        path = local_checkpoint(path, inner_path=ref.path)
        path = formats.rewritten(path, cache=store.settings.cache_dir) or path
    uri = ref.key if path is None else path_uri(path)
    stored = store.checkpoint(uri)
    if stored is None and path is not None:
        fresh = _first_seen(of, path, title, store)
        path, uri = Path(fresh.where), fresh.uri
        stored = store.checkpoint(uri)
        if stored is None:  # the catalog cannot be written
            return _as_stated(fresh, of, store), {shard.name: "source" for shard in fresh.manifest.shards}
    copies = {} if stored is None else best_copies(stored.copies)
    if stored is None or not all(shard.name in copies for shard in stored.manifest.shards):
        if ref.gated:
            raise ModelGatedError(title, ref.info_url)
        raise CheckpointNotFoundError(
            shown_uri(uri),
            f"The checkpoint of {title!r} is at {shown_uri(uri)}, and the catalog knows no copy of it on this "
            f"machine. `lading {'pull' if path is None else 'index'} {title}` "
            f"{'fetches it' if path is None else 'records the files that are there'}.",
        )

    files = tuple(_as_it_is(copies[shard.name].path) for shard in stored.manifest.shards)
    checkpoint = Checkpoint(
        name=name,
        uri=uri,
        where=shown_uri(uri) if path is None else str(path),
        manifest=stored.manifest,
        files=files,
        ref=ref if path is None else None,
        revision=stored.revision,
        published=stored.published,
    )
    kinds = {shard.name: copies[shard.name].kind for shard in stored.manifest.shards}

    return _as_stated(checkpoint, of, store), kinds


def _as_stated(checkpoint: Checkpoint, of: AssetCard | Path, store: AssetStore) -> Checkpoint:
    """Return the checkpoint with the digests that its card states as the expected ones."""
    return checkpoint if isinstance(of, Path) else with_digests(with_pins(checkpoint, of, store), of, store)


def _first_seen(of: AssetCard | Path, path: Path, title: str, store: AssetStore) -> Checkpoint:
    """Return the checkpoint at a path that the catalog does not know, and record it if it can be written."""
    if not store.database.writable:
        return LocalCheckpointFiles.read(path, cache=store.settings.cache_dir).checkpoint(title)
    if isinstance(of, AssetCard):
        return card_checkpoint(of, store)

    stored = index_checkpoint(path, store=store)
    found = uri_path(stored.uri)
    if found is None:
        raise InternalError(f"{path} was indexed as {stored.uri}, expected the URI of a path")

    return LocalCheckpointFiles.read(found, cache=store.settings.cache_dir).checkpoint(title)


_GONE = FileStat(0, 0, 0, 0)


def _as_it_is(path: Path) -> ShardFile:
    try:
        return ShardFile(path=path, stat=FileStat.from_stat(os.stat(path)))
    except FileNotFoundError:
        return ShardFile(path=path, stat=_GONE)


def _checked(
    checkpoint: Checkpoint, of: AssetCard | Path, store: AssetStore, *, progress: bool
) -> tuple[list[Check], list[str]]:
    """Return one check of each file, and the names of the tensors that differ from their digests."""
    shards, files = checkpoint.manifest.shards, checkpoint.here()
    there = [i for i, file in enumerate(files) if file.stat != _GONE]
    checks = {check.file: check for check in check_files(checkpoint, there, progress=progress)}
    rest = [i for i in there if shards[i].name not in checks]
    if checkpoint.published is not None:  # what a card states holds beside what the source does
        rest = [i for i in there if i in rest or checks[shards[i].name].result != "mismatch"]
    by_tensors, different = _checked_by_tensors(checkpoint, rest, of, store, progress=progress)
    checks |= {check.file: check for check in by_tensors}
    checks |= _checked_records(checkpoint, [i for i in rest if checks[shards[i].name].result != "mismatch"])
    checks |= _checked_headers(checkpoint, [i for i in rest if checks[shards[i].name].result != "mismatch"], store)

    found = [
        checks.get(shard.name) or checkpoint.check(i, "presence", expected=f"{shard.size} bytes", found=None)
        for i, shard in enumerate(shards)
    ]

    return found, different


def _checked_by_tensors(
    checkpoint: Checkpoint, chosen: Sequence[int], of: AssetCard | Path, store: AssetStore, *, progress: bool
) -> tuple[list[Check], list[str]]:
    """Return checks of files by the digests of their tensors, and the names of those that differ."""
    manifest, files = checkpoint.manifest, checkpoint.here()
    if not chosen:
        return [], []

    expected = store.digests(checkpoint.uri, manifest) if checkpoint.digests is None else checkpoint.digests
    dims = dims_of(checkpoint, of, store) if expected is None else expected.dims
    found: dict[int, Digests] = {}
    if manifest.pieces:
        return _checked_together(checkpoint, chosen, expected, dims, store, progress=progress)
    checks, different = [], []
    for i in chosen:
        part = manifest.only(i)
        try:
            if _has_same_tensors(checkpoint, i, store):
                own = [dims[t] for t in manifest.tensors_of(i)]
                found[i] = hash_checkpoint(part, [files[i]], own, progress=progress)
        except CorruptModelCheckpointError:
            pass  # not even a checkpoint any more
        check = checkpoint.check(
            i,
            "blake3",
            expected=shard_digest(manifest, expected, i) if expected is not None else None if i in found else "tensors",
            found=shard_digest(part, found[i], 0) if i in found else None,
        )
        checks.append(check)
        if expected is not None and i in found and check.result == "mismatch":
            tensors = zip(manifest.tensors_of(i), found[i].iter(part), strict=True)
            different += [manifest.names[t] for t, digest in tensors if digest != expected.of(manifest, t)]

    if expected is None and len(found) == len(manifest.shards):
        rows = [(d.dim, d.blocks) for i in chosen for d in found[i].iter(manifest.only(i)) if d is not None]
        record_digests(store.database, uri=checkpoint.uri, manifest=manifest, digests=recorded(manifest, rows))

    return checks, different


def _checked_together(
    checkpoint: Checkpoint,
    chosen: Sequence[int],
    expected: Digests | None,
    dims: Sequence[int],
    store: AssetStore,
    *,
    progress: bool,
) -> tuple[list[Check], list[str]]:
    """Return checks of files that hold pieces of tensors, and the names of those that differ: all files of a tensor
    that differs are wrong.
    """
    manifest, files = checkpoint.manifest, checkpoint.here()
    found = None
    try:
        if len(chosen) == len(files) and _has_same_tensors(checkpoint, 0, store):
            found = hash_checkpoint(manifest, files, dims, progress=progress)
    except CorruptModelCheckpointError:
        pass  # not even a checkpoint any more
    checks = []
    for i in chosen:
        before, now = (digests and shard_digest(manifest, digests, i) for digests in (expected, found))
        checks.append(checkpoint.check(i, "blake3", expected=before or (None if now else "tensors"), found=now or None))
    if expected is None and found is not None:
        record_digests(store.database, uri=checkpoint.uri, manifest=manifest, digests=found)
    different = [] if expected is None or found is None else differences(expected, found)

    return checks, [manifest.names[i] for i, _ in different]


def _checked_records(checkpoint: Checkpoint, chosen: Sequence[int]) -> dict[str, Check]:
    """Return the checks of zip archives with a record that does not have the CRC that `torch.save` stored.

    The digests are those of the first bytes that lading read, so they do not show bytes that were wrong then.
    """
    checks: dict[str, Check] = {}
    for i in chosen:
        if checkpoint.manifest.shards[i].name.endswith(DISTRIBUTED_SUFFIX):
            continue  # many archives in a row
        if (damaged := damaged_record(checkpoint.here()[i].path)) is not None:
            record, *sums = damaged
            expected, found = (f"{crc:08x} of {record}" for crc in sums)
            checks[checkpoint.manifest.shards[i].name] = checkpoint.check(i, "crc32", expected=expected, found=found)

    return checks


def _checked_headers(checkpoint: Checkpoint, chosen: Sequence[int], store: AssetStore) -> dict[str, Check]:
    """Return the checks of files with right tensors and wrong other bytes; record unknown digests."""
    known = last_digests(store.database, checkpoint.uri, HEADER)
    checks = header_checks(checkpoint, known, chosen)
    record_files(store.database, uri=checkpoint.uri, checks=[check for check in checks if check.result == "recorded"])

    return {check.file: check for check in checks if check.result == "mismatch"}


def _has_same_tensors(checkpoint: Checkpoint, shard: int, store: AssetStore) -> bool:
    """Return whether the header of a file still has the tensors that the catalog records.

    :raises CorruptModelCheckpointError: the header is invalid.
    """
    if checkpoint.ref is None:
        here = LocalCheckpointFiles.read(Path(checkpoint.where), cache=store.settings.cache_dir)
        return here.manifest.tensors_equal(checkpoint.manifest)

    return index_file(checkpoint.here()[shard].path).tensors_equal(checkpoint.manifest.only(shard))


def dims_of(checkpoint: Checkpoint, of: AssetCard | Path, store: AssetStore) -> array[int]:
    """Return the dims along which ranks would cut the tensors, if the family and its configuration are known."""
    if isinstance(of, AssetCard):
        try:
            model = resolve_model(of, store, checkpoint=checkpoint)
        except (AssetCardError, FetchError, NotSupportedError, TorchNotFoundError):
            return default_dims(checkpoint.manifest)
        return _family_dims(checkpoint, model)

    try:
        return _family_dims(checkpoint, resolve_model(of, store))
    except LadingError as error:  # what is at a path need not be of a family that lading knows
        log.info("the dims of %s are not known: %s", of, error)
        return default_dims(checkpoint.manifest)


def _family_dims(checkpoint: Checkpoint, model: ResolvedModel) -> array[int]:
    family, config = model.family, model.config

    return match(checkpoint.manifest, targets_of_config(family, config), family, config).block_dims()


def _record(checkpoint: Checkpoint, kinds: dict[str, CopyKind], checks: Sequence[Check], store: AssetStore) -> None:
    good = [check for check in checks if check.result != "mismatch"]
    copies = [LocalCopy(file=c.file, path=c.path, stat=c.stat, kind=kinds[c.file]) for c in good]
    record_files(store.database, uri=checkpoint.uri, copies=copies, checks=checks)


@contextmanager
def _set_aside(paths: Sequence[Path]) -> Iterator[None]:
    """Hide files from the body, which fetches others in their place; if it fails, they are back."""
    aside = {path: path.with_name(f".{path.name}.damaged") for path in paths if path.exists()}
    for path, hidden in aside.items():
        path.replace(hidden)
    try:
        yield
    except BaseException:
        for path, hidden in aside.items():
            if not path.exists():
                hidden.replace(path)
        raise
    finally:
        for hidden in aside.values():
            hidden.unlink(missing_ok=True)


def _refuse_foreign(bad: Sequence[Check], kinds: dict[str, CopyKind], checkpoint: Checkpoint) -> None:
    """Check that all wrong files are in a cache, so that lading may replace them.

    :raises NotSupportedError: a file is not.
    """
    foreign = [c.path for c in bad if kinds[c.file] not in ("cache", "hub") and revision_of(c.path) is None]
    if foreign or checkpoint.ref is None:
        raise NotSupportedError(
            f"{foreign[0] if foreign else checkpoint.where} is not the file that was verified, and lading did "
            f"not fetch it, so it does not replace it. {remedy(checkpoint, files=len(bad))}"
        )
