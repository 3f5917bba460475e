"""Asset cards and architectures as values, and the resolution of a name to a card.

A *card file* holds :class:`CardEntry` and :class:`ArchitectureEntry` values, one per document. An :class:`AssetCard` is
the result of resolving a name: an entry, with the overlay of an environment applied, and the card that it is based on.

The semantics are those of fairseq2 0.8.1 (``fairseq2.assets``), with two corrections: a cycle of bases is an error, and
a relative path resolves against the file that states it, even if another card inherits it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeGuard, TypeVar
from urllib.parse import urlsplit

from lading.errors import AssetCardError
from lading.formats.folder import require_state_dict
from lading.system.filesystem import expand_home
from lading.system.uris import path_uri, shown_uri

T = TypeVar("T", bool, int, float, str, list[object], dict[str, object])

USER_ENV = "user"
"""The environment whose overlays always take precedence."""

CONFIG_KEYS = ("model_config_overrides", "model_config_override", "model_config")
"""The fields that may hold configuration overrides, older names first."""

TOKENIZER_CONFIG_KEYS = ("tokenizer_config_overrides", "tokenizer_config_override", "tokenizer_config")
"""The fields that may hold overrides of the tokenizer's configuration, likewise."""

ADAPTER_FIELDS = ("adapter", "adapters")
"""The fields that may name LoRA adapters."""

FIELDS = (
    "base",
    "model_family",
    "model_arch",
    *CONFIG_KEYS,
    "parameters",
    "checkpoint",
    "checkpoint_path",
    "state_dict",
    "sha256",
    "digests",
    *ADAPTER_FIELDS,
    "restrict",
    "stream",
    "tokenizer",
    "tokenizer_path",
    "tokenizer_ref",
    "tokenizer_family",
    *TOKENIZER_CONFIG_KEYS,
    "url",
    "license",
)
"""The fields, besides the name, that lading reads. A card may have others, which are kept and can be looked up."""

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_GATED = re.compile(r" *gated *= *(true|false) *", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardEntry:
    """One document of a card file: the fields of a card, or of an overlay to it."""

    name: str
    env: str = ""
    """The environment of an overlay; empty for the card itself."""
    metadata: Mapping[str, object]
    """All fields except the name; plain JSON values."""
    folder: Path | None = None
    """The folder of the card's file, against which its relative paths resolve."""
    source: str = ""
    """The document that holds the entry, for messages: ``qwen.yaml[3]``."""

    @property
    def base(self) -> str | None:
        base = self.metadata.get("base")
        return base if isinstance(base, str) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureEntry:
    """One document of a card file that describes an architecture: values of a family's configuration."""

    name: str
    family: str
    base: str | None = None
    """Another architecture of the same family, whose configuration this one overrides."""
    config: Mapping[str, object]
    """Overrides of the configuration of ``base``, or of the defaults of the family's configuration class."""
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """An architecture of a family: overrides of the defaults of the family's configuration class, base first."""

    name: str
    family: str
    overrides: tuple[Mapping[str, object], ...]
    sources: tuple[str, ...] = field(default=(), compare=False)
    """The document that holds each of ``overrides``, for messages; may be shorter."""


@dataclass(frozen=True, slots=True)
class AssetCard:
    """A card as its name resolves to it. Fields that the card lacks are looked up in its bases."""

    name: str
    metadata: Mapping[str, object]
    """The card's own fields, with the overlay of an environment applied."""
    base: AssetCard | None = None
    folders: Mapping[str, Path | None] = field(default_factory=dict, repr=False, compare=False)
    """The folder of the file that states each field, by the field's name."""
    source: str = field(default="", compare=False)
    """The file and the document that hold the card."""
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """The document that states a field, by the field's name, for fields of an overlay."""
    env: str | None = field(default=None, compare=False)
    """The environment requested after the name; ``None`` if none was, and empty to apply no overlay."""

    @property
    def title(self) -> str:
        """The name that commands resolve to exactly this card: ``name``, or ``name@env``."""
        return self.name if self.env is None else f"{self.name}@{self.env}"

    def field(self, name: str) -> AssetCardField:
        """Return the field ``name`` of this card, or of the nearest base that has it.

        :raises AssetCardError: neither has it.
        """
        found = self.maybe_get_field(name)
        if found is None:
            raise AssetCardError(
                self.name,
                f"The card {self.name!r} and its bases have no field {name!r}{self._in_source()}. State it "
                "in the card.",
            )

        return found

    def maybe_get_field(self, name: str) -> AssetCardField | None:
        """Return the field ``name`` as :meth:`field` does; ``None`` if no card of the chain has it.

        A null in a card removes the field of its bases.
        """
        card: AssetCard | None = self
        while card is not None:  # faster than `chain()`: an import looks up six fields of each card
            if name in card.metadata:
                value = card.metadata[name]
                return None if value is None else AssetCardField(name, self, value, card.folders.get(name))
            card = card.base

        return None

    def has_field(self, name: str) -> bool:
        """Return whether this card or one of its bases has the field ``name``, and no nearer card removes it."""
        return self.maybe_get_field(name) is not None

    def chain(self) -> Iterator[AssetCard]:
        """Yield the card, its base, the base's base, and so on."""
        card: AssetCard | None = self
        while card is not None:
            yield card
            card = card.base

    def fields(self) -> dict[str, object]:
        """Return all fields of the card and its bases; if several cards have a field, that of the nearest one."""
        merged: dict[str, object] = {}
        for card in reversed(list(self.chain())):
            merged.update(card.metadata)
        merged.pop("base", None)

        return {name: value for name, value in merged.items() if value is not None}

    def source_of(self, name: str) -> str:
        """Return the document that states the card's own field ``name``."""
        return self.sources.get(name, self.source)

    def _in_source(self) -> str:
        return f" ({self.source})" if self.source else ""


@dataclass(frozen=True, slots=True)
class AssetCardField:
    """A field of a card."""

    name: str
    card: AssetCard
    """The card that was looked at; the field may be stated by one of its bases."""
    value: object
    folder: Path | None = None

    def as_(self, kls: type[T]) -> T:
        """Return the value if its type is exactly ``kls`` (``True`` is not an ``int``, ``1`` is not a ``float``).

        :raises AssetCardError: it is of another type.
        """
        if type(self.value) is not kls:
            raise AssetCardError(
                self.card.name,
                f"The field {self.name!r} of the card {self.card.name!r} is expected to be of type {kls.__name__}, "
                f"but is {self.value!r}, of type {type(self.value).__name__}{self.card._in_source()}. "
                "Correct it there.",
            )

        return self.value

    def as_uri(self) -> str:
        """Return the value as a URI: a path as a ``file://`` URI, a relative one resolved against the card's folder.

        :raises AssetCardError: the value is not a string, or is a relative path in a card that is not from a file.
        """
        value = self.as_(str).strip()
        if not value:
            raise AssetCardError(
                self.card.name,
                f"The field {self.name!r} of the card {self.card.name!r} is empty{self.card._in_source()}. State an "
                "address, or leave it out.",
            )
        if _SCHEME.match(value):
            return value

        path = expand_home(value)
        if not path.is_absolute():
            if self.folder is None:
                raise AssetCardError(
                    self.card.name,
                    f"The field {self.name!r} of the card {self.card.name!r} is the relative path {value!r}, but the "
                    "card does not come from a file that it could be relative to. Use an absolute path.",
                )
            path = self.folder / path

        return path_uri(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRef:
    """The parsed ``checkpoint`` field of a card."""

    uri: str
    """The URI without parameters; empty if the card names none."""
    gated: bool
    info_url: str | None
    """The page on which to request access to a gated model."""
    path: str | None = None
    """The path inside the source, if the card names one: its ``checkpoint_path``, its ``state_dict``, or both."""

    @property
    def scheme(self) -> str:
        return urlsplit(self.uri).scheme

    @property
    def key(self) -> str:
        """The URI that identifies the checkpoint, its path included."""
        return self.uri if self.path is None else f"{self.uri.rstrip('/')}/{self.path.strip('/')}"

    @property
    def shown(self) -> str:
        """The key without secrets, for messages."""
        return replace(self, uri=shown_uri(self.uri)).key


def is_count(value: object) -> TypeGuard[int]:
    """Return whether ``value`` is a number of parameters: a positive integer below 10¹⁸."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**18


StreamMode = bool | Literal["auto"]
"""``True`` to read a checkpoint straight from its source, ``False`` to fetch it, ``"auto"`` to fetch it if it fits."""


def is_stream_mode(value: object) -> TypeGuard[StreamMode]:
    """Return whether ``value`` is a value of the field ``stream``."""
    return isinstance(value, bool) or value == "auto"


def stream_mode(card: AssetCard) -> StreamMode:
    """Return the field ``stream`` of a card; ``False`` without one.

    :raises AssetCardError: it has another value.
    """
    found = card.maybe_get_field("stream")
    if found is None:
        return False
    if not is_stream_mode(found.value):
        raise AssetCardError(
            card.name,
            f"The field 'stream' of the card {card.name!r} is expected to be true, false or auto, but is "
            f"{found.value!r}{card._in_source()}.",
        )

    return found.value


def checkpoint_ref(card: AssetCard) -> CheckpointRef:
    """Return the checkpoint that a card names. A card without one, or with ``;gated=true`` after the URI, is gated.

    :raises AssetCardError: ``checkpoint``, ``checkpoint_path``, ``state_dict`` or ``url`` is not a string, or
        ``state_dict`` is not a dotted path.
    """
    url_field = card.maybe_get_field("url")
    url = None if url_field is None else url_field.as_(str)

    found = card.maybe_get_field("checkpoint")
    if found is None:
        return CheckpointRef(uri="", gated=True, info_url=url)

    uri, gated = split_gated(found.as_uri())

    return CheckpointRef(
        uri=uri, gated=gated, info_url=(url or shown_uri(uri)) if gated else url, path=_inner_path(card)
    )


def _inner_path(card: AssetCard) -> str | None:
    """Return the path inside the source: a state dict is below the file that holds it."""
    path, state_dict = card.maybe_get_field("checkpoint_path"), card.maybe_get_field("state_dict")
    inner = None if path is None else path.as_(str)
    if state_dict is None:
        return inner
    name = state_dict.as_(str)
    try:
        require_state_dict(name)
    except ValueError as error:
        raise AssetCardError(card.name, f"The card {card.name!r}: {error}{card._in_source()}.") from None

    return name if inner is None else f"{inner.rstrip('/')}/{name}"


def split_gated(uri: str) -> tuple[str, bool]:
    """Split ``;gated=true`` or ``;gated=false``, as in fairseq2's cards, from a URI; return the URI and the flag.

    Anything else after a ``;`` is a part of the URI, and dropping it would name something else.
    """
    gated = False
    while True:
        # A single pattern would search for spaces before a `;`, which takes hours in a megabyte of spaces.
        head, semicolon, last = uri.rstrip(" ").removesuffix(";").rpartition(";")
        match = _GATED.fullmatch(last)
        if not semicolon or match is None:
            return uri, gated
        uri, gated = head.rstrip(" "), gated or match[1].lower() == "true"


def is_sha256(value: object) -> bool:
    """Return whether ``value`` is a SHA-256 in hexadecimal."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def pinned_digests(card: AssetCard) -> dict[str, str]:
    """Return the SHA-256 of the files that a card pins, by file name; under the empty name that of the only file.

    :raises AssetCardError: the field ``sha256`` is neither a digest nor a mapping to digests.
    """
    field = card.maybe_get_field("sha256")
    if field is None:
        return {}
    stated = field.value if isinstance(field.value, Mapping) else {"": field.value}
    if not all(is_sha256(digest) for digest in stated.values()):
        raise AssetCardError(
            card.name,
            f"The field 'sha256' of the card {card.name!r} is expected to be 64 hexadecimal digits, or a mapping of "
            f"file names to them, but is {field.value!r}{card._in_source()}. Correct it there.",
        )

    return {name: str(digest).lower() for name, digest in stated.items()}


def digests_uri(card: AssetCard) -> str | None:
    """Return the URI of the document that publishes the digests of a card's tensors; ``None`` without one.

    :raises AssetCardError: the field ``digests`` is not a string, or is a relative path in a card that is not from a
        file.
    """
    field = card.maybe_get_field("digests")

    return None if field is None else field.as_uri()


# --- resolution ------------------------------------------------------------------------------------------------------


def reads_as_path(text: str) -> bool:
    """Return whether a text, where a name is taken, is a path by its first characters."""
    return text in (".", "..") or text.startswith(("./", "../", "/", "~"))


def split_name(name: str) -> tuple[str, str | None]:
    """Split ``name@env`` into name and environment; the latter is ``None`` without an ``@``, and may be empty."""
    plain, at, env = name.partition("@")

    return plain.strip(), env.strip() if at else None


def resolve_card(name: str, envs: Sequence[str], look_up: Callable[[str], Mapping[str, CardEntry]]) -> AssetCard | None:
    """Return the card that ``name`` stands for; ``None`` without an entry of that name.

    :param envs: environments in the order in which their overlays are tried; the first existing one is applied.
    :param look_up: returns all entries of a name, by environment (the card itself under the empty one).

    :raises AssetCardError: a base does not exist, or is a card of the chain already; or an overlay that is not the
        user's own removes a digest by which the card pins a file.
    """
    chain: list[AssetCard] = []
    seen: list[str] = []
    applied: list[CardEntry] = []
    at: str | None = name

    while at is not None:
        entries = look_up(at)
        entry = entries.get("")
        if entry is None:
            if not chain:
                return None
            last = chain[-1]
            raise AssetCardError(
                name,
                f"The card {last.name!r} is based on {at!r}, which is not in the catalog ({last.source}). "
                "Import the card of that name, or correct the `base`.",
            )

        metadata = dict(entry.metadata)
        folders: dict[str, Path | None] = dict.fromkeys(metadata, entry.folder)
        sources: dict[str, str] = {}
        overlay = next((entries[env] for env in envs if env in entries), None)
        if overlay is not None:
            if overlay.env != USER_ENV:
                applied.append(overlay)
            metadata.update(overlay.metadata)
            folders.update(dict.fromkeys(overlay.metadata, overlay.folder))
            sources = dict.fromkeys(overlay.metadata, overlay.source)

        chain.append(AssetCard(at, metadata, None, folders, entry.source, sources))
        seen.append(at)

        base = metadata.get("base")
        at = base if isinstance(base, str) else None
        if at in seen:
            raise AssetCardError(
                name,
                f"The bases of the card {name!r} form a cycle: {' → '.join([*seen, at])} ({entry.source}). "
                "Correct the `base` of one of them.",
            )

    card: AssetCard | None = None
    for each in reversed(chain):
        card = replace(each, base=card)
    if card is not None and applied:
        _require_pins(card, applied[0], lambda: resolve_card(name, [env for env in envs if env == USER_ENV], look_up))

    return card


def _require_pins(card: AssetCard, overlay: CardEntry, without: Callable[[], AssetCard | None]) -> None:
    """Require that a card with an overlay pins all files that the card pins without it.

    :param without: returns the card without overlays that are not the user's own.

    :raises AssetCardError: the overlay removes or changes a pin.
    """
    try:
        plain = without()
    except AssetCardError:
        return  # without the overlay, the card cannot be loaded at all
    pins = {} if plain is None else pinned_digests(plain)
    published = None if plain is None else digests_uri(plain)
    removed = not pins.items() <= pinned_digests(card).items() or published not in (None, digests_uri(card))
    if plain is not None and (pins or published or _pins_adapters(plain)):
        # They change the weights of the pinned files.
        removed = removed or any(plain.fields().get(name) != card.fields().get(name) for name in ADAPTER_FIELDS)
    if removed:
        raise AssetCardError(
            card.name,
            f"The card {card.name!r} pins its weights by `sha256` or `digests`, and with the overlay {overlay.env!r} "
            f"({overlay.source}) it would have others. Only an overlay of the environment {USER_ENV!r} can change "
            "pins; others can add some. State the digests in the card itself, or make the overlay a card of its own.",
        )


def _pins_adapters(card: AssetCard) -> bool:
    adapters = card.fields().get("adapters")

    return isinstance(adapters, list) and any(isinstance(each, dict) and "sha256" in each for each in adapters)


def resolve_architecture(
    name: str, family: str, look_up: Callable[[str], ArchitectureEntry | None]
) -> Architecture | None:
    """Return the architecture ``name`` of ``family``, overrides of its bases first; ``None`` if it does not exist.

    :raises AssetCardError: a base does not exist, or is an architecture of the chain already.
    """
    chain: list[ArchitectureEntry] = []
    at: str | None = name

    while at is not None:
        entry = look_up(at)
        if entry is None:
            if not chain:
                return None
            raise AssetCardError(
                name,
                f"The {family} architecture {chain[-1].name!r} is based on {at!r}, which is not in the catalog "
                f"({chain[-1].source}). Import the architecture of that name, or correct the `base`.",
            )

        chain.append(entry)
        at = entry.base
        if any(at == other.name for other in chain):
            cycle = " → ".join([*(other.name for other in chain), str(at)])
            raise AssetCardError(
                name,
                f"The bases of the {family} architecture {name!r} form a cycle: {cycle}. "
                "Correct the `base` of one of them.",
            )

    chain.reverse()

    return Architecture(
        name=name,
        family=family,
        overrides=tuple(entry.config for entry in chain),
        sources=tuple(entry.source for entry in chain),
    )
