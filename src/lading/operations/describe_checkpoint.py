"""Descriptions of checkpoints for their cards: what they hold, and what the files beside them say; no weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lading.cards.card import AssetCard, CheckpointRef, checkpoint_ref
from lading.cards.front_matter import MAX_README_BYTES, README_NAME, front_matter_fields
from lading.catalog.records import CheckpointContents, FoundArtifact
from lading.catalog.store import AssetStore
from lading.checkpoints.checkpoint import LocalCheckpointFiles
from lading.checkpoints.fetch_to_index import must_fetch_to_index
from lading.checkpoints.published import PublishedCheckpoint, index_source, name_in_source
from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError, FetchError, NotSupportedError
from lading.formats import NonContiguousError, NotByHeadersError
from lading.formats.adapter_config import ADAPTER_CONFIG_NAME, ADAPTER_NAME, parse_adapter_config
from lading.formats.artifacts import LORA, not_loaded_error
from lading.formats.config_json import MAX_CONFIG_SIZE, parse_config_json, read_hf_config
from lading.formats.files import open_regular
from lading.formats.folder import folder_of, is_checkpoint_file
from lading.formats.manifest import Manifest
from lading.models.recognize import Recognizer
from lading.operations.card_names import Place
from lading.operations.find_checkpoints import FoundCheckpoint, artifact_at, storable_uri
from lading.sources.hub.address import HubAddress, is_repo_id
from lading.sources.open import HUB_SCHEMES, open_source
from lading.sources.source import read_bytes
from lading.system.filesystem import expand_home, path_exists
from lading.system.uris import path_uri, shown_uri

log = logging.getLogger("lading")


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A checkpoint as its card is to state it."""

    uri: str
    shown: str
    """The path, or the address without secrets."""
    place: Place
    fields: Mapping[str, object]
    """The fields of a card; without ``model_family`` if ``config.json`` is missing."""
    adapter_of: str | None = None
    """The name or the path of the model that an adapter was trained on; empty if its configuration does not say."""
    manifest: Manifest | None = None
    """``None`` if the tensors can only be read after a rewrite."""
    file_uri: str = ""
    """The URI of the file or folder that its card states: that of a checkpoint on this machine without the state dict
    inside. Empty for others."""
    contents: CheckpointContents | None = None
    """The contents for the catalog to record; ``None`` if it knows them."""
    files: LocalCheckpointFiles | None = None
    """The files, if they are on this machine and the catalog does not know them as they are."""

    @property
    def field(self) -> str:
        """The field of a card that states its place."""
        return "checkpoint" if self.adapter_of is None else "adapter"

    def bases(self) -> tuple[str, ...]:
        """Return the URIs that an adapter may mean by the model that it was trained on."""
        stated = self.adapter_of or self.fields.get("base_model")
        if self.adapter_of is None or not isinstance(stated, str) or not stated.isprintable():
            return ()
        hub = [f"hg://{stated}"] if is_repo_id(stated) else []

        return (*hub, path_uri(expand_home(stated))) if path_exists(expand_home(stated)) else tuple(hub)

    def require_family(self, fields: Mapping[str, object]) -> None:
        """Require that the fields of the card state the family of the model.

        :raises NotSupportedError: they do not, as ``config.json`` is missing.
        """
        if {"model_family", "base"} & fields.keys():
            return
        if self.adapter_of is not None:
            raise NotSupportedError(
                f"{self.shown} is a LoRA adapter of {self.adapter_of or 'a model that it does not name'}, and no card "
                "has that model. Add it, too, or state the name of its card as `base`: `lading add … --set base=NAME`."
            )
        raise NotSupportedError(
            f"{self.shown} has no config.json, so the family of the model is unknown. State the family and the "
            "architecture: `--set model_family=NAME --set model_arch=NAME` (`lading archs` shows them)."
        )


class Describer:
    """Descriptions of many checkpoints, for which each kind of ``config.json`` is understood once.

    :param restrict: as :func:`lading.formats.index` takes it.
    :param accept: whether files are the right ones as they are now, even if the catalog has digests of others.
    """

    def __init__(self, store: AssetStore, *, restrict: bool, accept: bool = False) -> None:
        self._store = store
        self._restrict = restrict
        self._accept = accept
        self._recognizer = Recognizer(store)
        self.artifacts: list[FoundArtifact] = []
        """The artifacts that were found in place of checkpoints."""

    def at_path(self, found: FoundCheckpoint, state_dict: object = None) -> Description:
        """Describe a checkpoint or a LoRA adapter on this machine, whose links lead nowhere else.

        :param state_dict: the field of that name in its card, if that states a string.

        :raises NotSupportedError: it is of a format or a model type that lading does not support, or another artifact,
            which :attr:`artifacts` has then.
        :raises ModelCheckpointError: it is damaged.
        :raises OSError: it cannot be read.
        """
        path = found.path
        artifact = artifact_at(path, found, found.artifact, restrict=self._restrict)
        if artifact is not None and artifact.kind == LORA:
            return self._adapter_at(found)
        if artifact is not None:
            self.artifacts.append(FoundArtifact(path=path, artifact=artifact))
            raise not_loaded_error(path, artifact)
        inside = path / state_dict if isinstance(state_dict, str) else path
        checkpoint = _field_of(path)
        hf_config = read_hf_config(path)
        fields = {**self._recognized(hf_config, path), "checkpoint": checkpoint, **_readme_at(path)}
        place = _place_of(path, found.root)

        described = Description(
            uri=path_uri(inside), file_uri=path_uri(path), shown=str(path), place=place, fields=fields
        )

        return self._with_contents(described, inside)

    def _adapter_at(self, found: FoundCheckpoint) -> Description:
        """Describe a LoRA adapter in a folder."""
        folder = found.path
        field = _field_of(folder)
        file = folder / ADAPTER_NAME
        config = parse_adapter_config(read_hf_config(folder, ADAPTER_CONFIG_NAME), label=str(folder))
        described = Description(
            uri=path_uri(file),
            shown=str(folder),
            place=_place_of(folder, found.root),
            fields={"adapter": field, **_readme_at(folder)},
            adapter_of=config.base or "",
        )

        return self._with_contents(described, file)

    def _with_contents(self, described: Description, path: Path) -> Description:
        """Add what the files at a path hold."""
        stored = self._store.checkpoint(described.uri)
        if not self._accept and stored is not None and LocalCheckpointFiles.as_known(path, stored) is not None:
            return replace(described, manifest=stored.manifest)
        try:
            files = LocalCheckpointFiles.read(
                path, cache=self._store.settings.cache_dir, restrict=self._restrict, rewrite=False
            )
        except NonContiguousError:
            return described

        return replace(described, manifest=files.manifest, contents=files.contents(accept=self._accept), files=files)

    def at_address(self, uri: str) -> Description:
        """Describe a checkpoint of a source by its ``config.json``, ``README.md`` and headers.

        :raises AddressError: the address is not valid.
        :raises NotSupportedError: its headers do not say what it holds; it is quantized; or as :meth:`at_path`.
        :raises CheckpointNotFoundError: the source does not have it.
        :raises FetchError: the source cannot be reached.
        """
        ref = CheckpointRef(uri=uri, gated=False, info_url=None)
        published = None
        if not must_fetch_to_index(ref):
            try:
                published = index_source(ref, settings=self._store.settings)
            except NotByHeadersError:
                pass
            except CheckpointNotFoundError as error:
                return self._adapter_at_address(uri, error)
        if published is None:
            raise NotSupportedError(
                f"{ref.shown} is of a format whose headers do not say what it holds, so it has to be fetched first. "
                "Name it in the `checkpoint` of a card of your own; `lading pull` fetches it."
            )
        readme = self._readme_of(ref, published)

        return Description(
            uri=uri,
            shown=ref.shown,
            place=_place_at(uri),
            fields={**self._recognized(published.hf_config, ref.shown), "checkpoint": uri, **readme},
            manifest=published.manifest,
            contents=CheckpointContents(uri=uri, manifest=published.manifest, revision=published.revision),
        )

    def _adapter_at_address(self, uri: str, error: CheckpointNotFoundError) -> Description:
        """Describe a LoRA adapter of a source.

        :param error: what to raise if it has none either.
        """
        ref = CheckpointRef(uri=uri, gated=False, info_url=None, path=ADAPTER_NAME)
        try:
            published = index_source(ref, settings=self._store.settings)
        except CheckpointNotFoundError:
            raise error from None
        label = f"{shown_uri(uri)}/{ADAPTER_CONFIG_NAME}"
        stated = self._read_beside(ref, published, ADAPTER_CONFIG_NAME, MAX_CONFIG_SIZE)
        if stated is None:
            raise error
        config = parse_adapter_config(parse_config_json(stated, label=label), label=shown_uri(uri))

        return Description(
            uri=ref.key,
            shown=shown_uri(uri),
            place=_place_at(uri),
            fields={"adapter": uri, **self._readme_of(ref, published)},
            adapter_of=config.base or "",
            manifest=published.manifest,
            contents=CheckpointContents(uri=ref.key, manifest=published.manifest, revision=published.revision),
        )

    def in_cache(self, uri: str, snapshot: Path) -> Description:
        """Describe a checkpoint of the hub by its files in a cache, which the catalog knows by ``uri`` already."""
        fields = {**self._recognized(read_hf_config(snapshot), snapshot), "checkpoint": uri, **_readme_at(snapshot)}
        stored = self._store.checkpoint(uri)

        return Description(
            uri=uri,
            shown=uri,
            place=_place_at(uri),
            fields=fields,
            manifest=None if stored is None else stored.manifest,
        )

    def _recognized(self, hf_config: Mapping[str, object], where: Path | str) -> Mapping[str, object]:
        return self._recognizer.fields(hf_config, where) if hf_config else {}

    def _readme_of(self, ref: CheckpointRef, published: PublishedCheckpoint) -> dict[str, object]:
        try:
            return front_matter_fields(self._read_beside(ref, published, README_NAME, MAX_README_BYTES) or b"")
        except (FetchError, CheckpointNotFoundError) as error:
            log.warning("%s: %s cannot be read, so the card has no license: %s", ref.shown, README_NAME, error)
            return {}

    def _read_beside(self, ref: CheckpointRef, published: PublishedCheckpoint, name: str, most: int) -> bytes | None:
        """Return the first ``most`` bytes of a file beside a checkpoint; ``None`` if it is not there."""
        shards = [shard.name for shard in published.manifest.shards]
        file = published.snapshot.file(name_in_source(published.inner, name, shards=shards))
        if file is None or not file.size:
            return None
        source = open_source(
            ref.uri, inner_path=ref.path, revision=published.revision or None, settings=self._store.settings
        )

        return read_bytes(source, published.snapshot, file, 0, min(file.size, most))


def _field_of(path: Path) -> str:
    """Return the ``checkpoint`` field of a card that means a path.

    :raises NotSupportedError: no text does.
    """
    uri = storable_uri(path)
    # A card's value has no spaces around it; a slash keeps those of a path.
    for text in (str(path), f"{path}/"):
        ref = checkpoint_ref(AssetCard("", {"checkpoint": text}))
        if (ref.uri, ref.gated) == (uri, False):
            return text

    raise NotSupportedError(f"{str(path)!r} cannot be the `checkpoint` of a card: it reads as {ref.uri!r}. Rename it.")


def _readme_at(path: Path) -> dict[str, object]:
    file = folder_of(path) / README_NAME
    try:
        with open_regular(file) as (opened, size):
            return front_matter_fields(opened.read(min(size, MAX_README_BYTES)))
    except CheckpointNotFoundError:
        return {}
    except (CorruptModelCheckpointError, OSError) as error:
        log.warning("%s cannot be read, so the card states nothing of it: %s", file, error)
        return {}


def _place_of(path: Path, root: Path) -> Place:
    below = len(path.relative_to(root).parts) if path != root else 1
    *folders, name = path.parts[1:] or ("",)
    if not path.is_dir():
        name = _without_suffix(name)

    return Place(parts=(*folders, name), below=below)


def _without_suffix(name: str) -> str:
    stem = name.removesuffix(".index.json")
    while is_checkpoint_file(stem):
        stem = stem.rpartition(".")[0]

    return stem or name


def _place_at(uri: str) -> Place:
    if uri.partition("://")[0] in HUB_SCHEMES:
        address = HubAddress.from_uri(uri)
        text = "/".join(filter(None, (address.repo, address.inner)))
    else:
        text = shown_uri(uri).partition("://")[2]
    *folders, name = text.strip("/").split("/")
    parts = (*folders, _without_suffix(name))

    return Place(parts=parts, below=len(parts))
