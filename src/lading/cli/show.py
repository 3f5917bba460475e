"""`lading show`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lading.cards.adapters import AdapterRef, adapter_refs
from lading.cards.addresses import stated_addresses, with_addresses
from lading.cards.card import CONFIG_KEYS, AssetCard, CheckpointRef, checkpoint_ref
from lading.cards.config_values import ConfigValue, config_values, iter_values
from lading.cards.overrides import Layer, default_layer, file_layer, layers_of
from lading.cli.command import command
from lading.cli.index import checkpoint_object, checkpoint_pairs
from lading.cli.output import Column, Form, as_json, listing_options, write_json, write_pairs, write_rows
from lading.cli.selection import Selection, select_models
from lading.errors import (
    AssetCardError,
    CheckpointNotFoundError,
    LadingError,
    ModelFamilyNotKnownError,
    NotSupportedError,
)
from lading.formats.adapter_config import ADAPTER_NAME
from lading.formats.artifacts import LORA, artifact_in
from lading.formats.config_json import read_hf_config
from lading.formats.folder import is_there
from lading.models.family import Family, get_family
from lading.models.hf_config import described_config
from lading.system.display import human_bytes, human_count
from lading.system.filesystem import path_exists
from lading.system.uris import path_uri, shown_name, shown_uri, uri_path

if TYPE_CHECKING:
    from lading.cards.card import Architecture
    from lading.catalog.store import AssetStore, ModelSummary, StoredCheckpoint


@command("show")
@select_models("NAME|PATH|URI")
@click.option("--tensors", is_flag=True, help="List the tensors of its checkpoint.")
@click.option("--shards", is_flag=True, help="List the files of its checkpoint.")
@listing_options
def show(selection: Selection, tensors: bool, shards: bool, form: Form) -> None:
    """Show a model's card, configuration and checkpoint.

    NAME may be a pattern with * and ? as in a shell, that of an overlay (NAME@user), or end in @ for the card without
    overlays. Reads the headers at a path that the catalog does not know. --csv and -q show only the fields of the card.

    For example: lading show qwen3_0.6b
    """
    if tensors and shards:
        raise click.UsageError("Only one of --tensors and --shards can be given.", click.get_current_context())

    from lading.catalog.store import get_asset_store
    from lading.checkpoints.card_links import names_of
    from lading.checkpoints.names import find_card, unknown_model

    store = get_asset_store()
    listing = _TENSORS if tensors else _SHARDS if shards else _FIELDS if form in (Form.CSV, Form.NAMES) else None
    rows: list[tuple[object, ...]] = []
    objects: list[dict[str, object]] = []
    shown: list[str] = []

    def show_one(name: str, found: Found) -> None:
        if listing is not None:
            rows.extend((*row, name) if selection.several else row for row in listing.rows(found))
        elif form is Form.TABLE:
            if shown:
                click.echo()
            _write_text(found)
        else:
            objects.append(_as_object(found))
        shown.append(name)

    def meaning(name: str) -> Found:
        card = find_card(name, store, ask=False)
        path = card if isinstance(card, Path) else None
        if isinstance(card, Path):
            place = shown_name(path_uri(card))
            card = AssetCard(place, {"checkpoint": place})
        if store.summary(card) is not None:
            return look_up(card, store)
        if path is None or not is_there(path):
            raise unknown_model(name, store)
        if owners := names_of(store, [uri := path_uri(path / ADAPTER_NAME)]).get(uri):
            return look_up(store.retrieve_card(owners[0]), store)
        return _look_at(card, store)

    selection.each(selection.resolve(meaning, store), show_one)

    if listing is not None:
        several = ["model"] if selection.several else []
        table = (*(Column(name=name) for name in several), *listing.table)
        write_rows((*listing.columns, *several), rows, form, table=table)
    elif form is Form.JSON:
        write_json(objects if selection.several else objects[0])
    elif form is Form.LINES:
        for value in objects:
            click.echo(as_json(value))
    selection.finish()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A card, and what the catalog knows of its model."""

    card: AssetCard
    summary: ModelSummary
    ref: CheckpointRef
    path: Path | None
    """The local path that the card names, if it names one."""
    checkpoint: StoredCheckpoint | None
    config: Mapping[str, object]
    """The whole configuration; only the values that cards and the architecture state, if the others are not known:
    those of a family that cannot be imported, or of a ``config.json`` that is not on this machine."""
    config_complete: bool
    layers: Sequence[Layer]
    """The parts of the configuration that are not defaults of the family."""
    parameters: int | None
    """The number of the model's parameters: of its checkpoint, else as the card states it or its family counts it."""
    problem: str | None


def look_up(card: AssetCard, store: AssetStore) -> Found:
    """Return what the catalog knows of a card's model.

    :raises AssetCardError: the card does not name its checkpoint as it should.
    """
    summary = store.summary(card)
    assert summary is not None  # it was retrieved just now
    ref = checkpoint_ref(card)
    path = uri_path(ref.uri)
    if path is not None and ref.path is not None:
        path = path / ref.path
    family, arch = _text_field(card, "model_family"), _text_field(card, "model_arch")

    problem = summary.problem
    architecture = None
    if family is not None and arch is not None:
        architecture = store.maybe_architecture(arch, family)
        if architecture is None and summary.status != "unknown-family":
            problem = problem or f"{arch!r} is not an architecture of the {family} family: run `lading archs {family}`."
    if family is not None and summary.status == "unknown-family":
        problem = problem or ModelFamilyNotKnownError(family).message
    stored = store.checkpoint(path_uri(path) if path is not None else ref.uri)
    found = described = None
    complete = False
    if family is not None and summary.status != "unknown-family":
        try:
            found = get_family(family)
            hf_config: Mapping[str, object] | None = {}
            # A family for all model types would import transformers.
            if arch is None and found.from_hf is not None and not found.reads_other_model_types:
                hf_config = read_hf_config(path) if path is not None else _config_here(card, ref, stored, store)
                described = described_config(found, hf_config or {})
            complete = hf_config is not None
        except (LadingError, OSError) as error:  # the mistake of another package, or a bad config.json
            problem = problem or str(error)
    layers = layers_of(card, architecture)
    if described is not None:
        values = asdict(described)
        stated = values if found is None or found.hf_stated is None else found.hf_stated(hf_config or {})
        own = {name: value for name, value in values.items() if name in stated}
        layers = [default_layer(values, family or ""), file_layer(own), *layers]

    return Found(
        card=card,
        summary=summary,
        ref=ref,
        path=path,
        checkpoint=stored,
        config=config_values(layers, found.config_kls if found is not None and complete else None),
        config_complete=complete,
        layers=layers,
        parameters=_parameters(card, summary, found, architecture, described)
        if found is not None and complete
        else summary.parameters,
        problem=problem,
    )


def _look_at(card: AssetCard, store: AssetStore) -> Found:
    """Return what is at the path of a card that the catalog does not know; the catalog stays as it is.

    :raises ModelCheckpointError: it is damaged, or no weights are there.
    :raises OSError: it cannot be read.
    """
    from lading.catalog.records import ModelSummary, StoredCheckpoint
    from lading.checkpoints.checkpoint import LocalCheckpointFiles

    ref = checkpoint_ref(card)
    path = uri_path(ref.uri)
    assert path is not None
    artifact = artifact_in(path)
    if artifact is not None:
        manifest, kind, dtypes, size, shards = None, artifact.kind, artifact.dtypes, artifact.bytes, artifact.files
    else:
        manifest = LocalCheckpointFiles.read(path, cache=store.settings.cache_dir, rewrite=False).manifest
        kind, dtypes = "checkpoint", tuple(manifest.dtype_counts)
        size, shards = manifest.total_bytes, len(manifest.shards)
    summary = ModelSummary(
        name=card.name,
        family=None,
        arch=None,
        base=None,
        status="unregistered" if kind in ("checkpoint", LORA) else "unloadable",
        checkpoint=ref.uri,
        revision=None,
        format=None if manifest is None else manifest.format,
        bytes=size,
        parameters=None if manifest is None else manifest.parameters,
        dtypes=",".join(dtypes) or None,
        shards=shards,
        license=None,
        local_path=str(path),
        verified_at=None,
        source=None,
        problem=None if artifact is None else artifact.reason,
        kind=kind,
    )
    stored = None
    if manifest is not None:
        stored = StoredCheckpoint(uri=ref.uri, revision="", manifest=manifest, copies=(), indexed_at="")

    return Found(
        card=card,
        summary=summary,
        ref=ref,
        path=path,
        checkpoint=stored,
        config={},
        config_complete=False,
        layers=(),
        parameters=summary.parameters,
        problem=summary.problem,
    )


def _config_here(
    card: AssetCard, ref: CheckpointRef, stored: StoredCheckpoint | None, store: AssetStore
) -> Mapping[str, object] | None:
    """Return the ``config.json`` beside a remote checkpoint; empty for a card without one, ``None`` if it is not here.

    :raises CorruptModelCheckpointError: it is not a JSON object.
    """
    if not ref.uri:
        return {}
    if stored is None:
        return None

    from lading.checkpoints.checkpoint import remote_checkpoint
    from lading.checkpoints.extra_files import config_here

    return config_here(remote_checkpoint(card.title, ref, stored.manifest, stored.revision), store)


def _parameters(
    card: AssetCard,
    summary: ModelSummary,
    family: Family[Any, Any],
    architecture: Architecture | None,
    described: Any,
) -> int | None:
    if summary.parameters is not None or family.shapes is None:
        return summary.parameters

    from lading.cards.config import resolve_config
    from lading.models.shapes import count_parameters

    try:
        return count_parameters(family, resolve_config(card, architecture, family.config_kls, described))
    except LadingError:  # a configuration that makes no model; `check` says why
        return None


def _text_field(card: AssetCard, name: str) -> str | None:
    field = card.maybe_get_field(name)

    return None if field is None else field.as_(str)


def fields_of(card: AssetCard) -> Iterator[tuple[str, object, str, str]]:
    """Yield name, value, card and document of each field, the card's own fields first."""
    seen = {"base"}
    for each in card.chain():
        shown = {place: shown_uri(address) for place, address in stated_addresses(each.metadata)}  # not the secrets
        for name, value in with_addresses(each.metadata, shown).items():
            if name not in seen:
                seen.add(name)
                yield name, value, each.name, each.source_of(name)


def _adapters(card: AssetCard) -> Sequence[AdapterRef]:
    """Return the adapters of a card; none if its fields are wrong, which is its problem then."""
    try:
        return adapter_refs(card)
    except AssetCardError:
        return ()


# --- for programs ----------------------------------------------------------------------------------------------------


def _as_object(found: Found) -> dict[str, object]:
    card, stored = found.card, found.checkpoint

    return {
        "name": card.name,
        "family": _text_field(card, "model_family"),
        "arch": _text_field(card, "model_arch"),
        "status": found.summary.status,
        "kind": found.summary.kind,
        "bytes": found.summary.bytes,
        "dtypes": found.summary.dtypes,
        "problem": found.problem,
        "license": _text_field(card, "license"),
        "parameters": found.parameters,
        "cards": [{"name": each.name, "source": each.source} for each in card.chain() if each.source],
        "source": found.summary.source,
        "fields": {
            name: {"value": value, "card": owner, "source": source} for name, value, owner, source in fields_of(card)
        },
        "config": found.config,
        "config_complete": found.config_complete,
        "config_from": {v.path: dict(zip(("kind", "name"), _origin(v, found), strict=True)) for v in _values(found)},
        "checkpoint": {
            "uri": shown_uri(found.ref.uri) or None,
            "path": found.ref.path,
            "gated": found.ref.gated,
            "local_path": _existing(found.path),
            "verified_at": _verified_at(stored),
            "indexed": None if stored is None else checkpoint_object(stored),
        },
        "adapters": [{"address": ref.card.name, "weight": ref.weight} for ref in _adapters(card)],
    }


def _existing(path: Path | None) -> Path | None:
    return path if path is not None and path_exists(path) else None


def _verified_at(stored: StoredCheckpoint | None) -> str | None:
    """Return the time since which all files are verified; ``None`` if some are not."""
    times = [copy.verified_at for copy in stored.copies] if stored is not None else []

    return min((time for time in times if time is not None), default=None) if None not in times else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listing:
    """A list of what belongs to a model."""

    columns: Sequence[str]
    table: Sequence[Column]
    rows: Callable[[Found], Iterable[tuple[object, ...]]]


def _rows_of_tensors(found: Found) -> Iterator[tuple[object, ...]]:
    for t in _indexed(found).manifest:
        yield t.name, t.dtype, t.shape, math.prod(t.shape), t.nbytes, t.shard.name, t.offset


def _rows_of_shards(found: Found) -> Iterator[tuple[object, ...]]:
    stored = _indexed(found)
    paths = {copy.file: copy.path for copy in stored.copies}
    for shard in stored.manifest.shards:
        yield shard.name, shard.size, shard.sha256, paths.get(shard.name)


_FIELDS = _Listing(
    columns=("field", "value", "card", "source"),
    table=(
        Column(name="field", keep=True),
        Column(name="value"),
        Column(name="card"),
        Column(name="source"),
    ),
    rows=lambda found: fields_of(found.card),
)
_CONFIG_TABLE = (
    Column(name="configuration", keep=True),
    Column(name="value"),
    Column(name="from"),
)
_TENSORS = _Listing(
    columns=("name", "dtype", "shape", "parameters", "bytes", "shard", "offset"),
    table=(
        Column(name="name", keep=True),
        Column(name="dtype"),
        Column(name="shape"),
        Column(name="parameters", show=human_count, right=True),
        Column(name="bytes", heading="size", show=human_bytes, right=True),
        Column(name="shard"),
    ),
    rows=_rows_of_tensors,
)
_SHARDS = _Listing(
    columns=("name", "bytes", "sha256", "local_path"),
    table=(
        Column(name="name", keep=True),
        Column(name="bytes", heading="size", show=human_bytes, right=True),
        Column(name="local_path", heading="local path"),
    ),
    rows=_rows_of_shards,
)


def _indexed(found: Found) -> StoredCheckpoint:
    if found.checkpoint is None:
        name = found.card.title
        if found.summary.status == "unloadable":
            raise NotSupportedError(f"{name}: {found.problem}")
        raise CheckpointNotFoundError(
            shown_uri(found.ref.uri),
            f"The checkpoint of {name!r} is not indexed in the catalog. Run `lading index {name}` to read its headers.",
        )

    return found.checkpoint


# --- for people ------------------------------------------------------------------------------------------------------


def summary_pairs(found: Found) -> dict[str, object]:
    """Return what there is to say of a model in a line each, by its label."""
    card, ref, stored = found.card, found.ref, found.checkpoint

    pairs: dict[str, object] = {
        "name": card.name,
        "kind": found.summary.kind,
        "family": _text_field(card, "model_family"),
        "architecture": _text_field(card, "model_arch"),
        "based on": " ← ".join(each.name for each in card.chain() if each is not card) or None,
        "status": found.summary.status,
        "problem": found.problem,
        "license": _text_field(card, "license"),
        "stated in": _stated_in(found.summary.source),
        "checkpoint": shown_uri(ref.uri) or None,
        "inner path": ref.path,
        "ask at": ref.info_url if ref.gated else None,
        "local path": _existing(found.path),
        "verified": _verified_at(stored),
        "adapters": ", ".join(
            ref.card.name if ref.weight == 1 else f"{ref.weight:g} × {ref.card.name}" for ref in _adapters(card)
        )
        or None,
    }
    if found.config and not found.config_complete:
        pairs["configuration"] = "only what cards state; a load takes the rest from the family or from config.json"
    if stored is not None:
        pairs |= checkpoint_pairs(stored)
    elif found.summary.kind is not None:
        pairs |= _artifact_pairs(found.summary)
    elif found.parameters is not None:
        pairs["parameters"] = human_count(found.parameters)

    return {name: value for name, value in pairs.items() if value is not None}


def _write_text(found: Found) -> None:
    write_pairs(summary_pairs(found))
    if found.summary.kind is not None:
        return  # it has no card

    click.echo()
    # The card's configuration is part of the last table.
    fields = [row for row in fields_of(found.card) if row[0] not in CONFIG_KEYS]
    write_rows(_FIELDS.columns, fields, Form.TABLE, table=_FIELDS.table)
    if found.config:
        click.echo()
        rows = list(config_rows(found))
        write_rows(("configuration", "value", "from"), rows, Form.TABLE, table=_CONFIG_TABLE)


def _artifact_pairs(summary: ModelSummary) -> dict[str, object]:
    return {"size": human_bytes(summary.bytes), "dtypes": summary.dtypes, "files": summary.shards}


def _stated_in(uri: str | None) -> str | None:
    """Return the file that states a card, with a note if it is not accessible now."""
    path = None if uri is None else uri_path(uri)

    return uri if path is None or path_exists(path) else f"{uri} (not accessible; the card is kept as it was)"


def config_rows(found: Found) -> Iterator[tuple[str, object, str]]:
    """Yield the dotted path of each value of the configuration, the value, and what states it."""
    for value in _values(found):
        yield value.path, value.value, " ".join(_origin(value, found))


def _values(found: Found) -> Iterator[ConfigValue]:
    return iter_values(found.config, found.layers)


def _origin(value: ConfigValue, found: Found) -> tuple[str, str]:
    """Return what states a value, and its name: the card, a base, the architecture, or the family by its defaults."""
    layer = value.layer

    return ("family", _text_field(found.card, "model_family") or "") if layer is None else (layer.kind, layer.owner)
