"""Configuration overrides of architectures and cards, and how they are merged.

The merge and its directives are those of fairseq2 0.8.1 (``fairseq2.utils.config``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

from lading.cards.card import CONFIG_KEYS, Architecture, AssetCard
from lading.cards.documents.document import join, show
from lading.errors import AssetCardError


@dataclass(frozen=True, slots=True)
class Layer:
    """Overrides, and the card, the architecture or the ``config.json`` that states them."""

    overrides: object
    """The overrides; expected to be a mapping, which the merge checks."""
    where: str
    """The location of the overrides, for messages: ``qwen.yaml[3].model_config``."""
    owner: str
    """The name of the card, the architecture, the file or the family."""
    kind: Literal["family", "file", "architecture", "card"] = "card"


def layers_of(card: AssetCard, architecture: Architecture | None, keys: Sequence[str] = CONFIG_KEYS) -> list[Layer]:
    """Return the overrides of a card's configuration in the order in which they apply.

    Those of ``architecture`` come first, then those of the card's chain from the root base to the card itself. Only the
    first of ``keys`` that any card of the chain has is used; a null removes what the bases say there. Environment
    variables are not expanded, so that the layers can be shown.
    """
    layers = [] if architecture is None else architecture_layers(architecture)

    chain = list(card.chain())
    for key in keys:
        stated: list[AssetCard] = []
        for each in chain:
            if each.metadata.get(key, True) is None:
                break
            if key in each.metadata:
                stated.append(each)
        if stated:
            return [*layers, *(_card_layer(each, key) for each in reversed(stated))]

    return layers


def architecture_layers(architecture: Architecture) -> list[Layer]:
    """Return the overrides of an architecture, those of its bases first."""
    count = len(architecture.overrides)
    sources = [*architecture.sources, *("" for _ in range(count))][:count]

    return [
        Layer(overrides, f"{source or architecture.name}.config", architecture.name, "architecture")
        for overrides, source in zip(architecture.overrides, sources, strict=True)
    ]


def file_layer(values: Mapping[str, object]) -> Layer:
    """Return the values of a whole configuration, read from the ``config.json`` beside a checkpoint."""
    # Replaced as a whole, as the file may hold keys that look like directives.
    return Layer({"_set_": dict(values)}, "config.json", "config.json", "file")


def default_layer(values: Mapping[str, object], family: str) -> Layer:
    """Return the values of a configuration that its ``config.json`` leaves to the family."""
    return Layer({"_set_": dict(values)}, "config.json", family, "family")


def _card_layer(card: AssetCard, key: str) -> Layer:
    return Layer(_mark_env(card.metadata[key]), f"{card.source_of(key) or card.name}.{key}", card.name, "card")


def last_layer(layers: Sequence[Layer], place: Sequence[str | int]) -> Layer | None:
    """Return the last layer that states the value at ``place``, or one that contains it.

    ``None`` means that none does, or that a later layer removes what it states.
    """
    for layer in reversed(layers):
        states = _states(layer.overrides, place)
        if states is not None:
            return layer if states else None

    return None


def _states(overrides: object, place: Sequence[str | int]) -> bool | None:
    """Return whether ``overrides`` state the value at ``place``; ``None`` if they leave it as it is."""
    removed = False
    for i, step in enumerate(place):
        if isinstance(overrides, Mapping):
            replaced, deleted = overrides.get("_set_"), overrides.get("_del_")
            removed = removed or (isinstance(deleted, list) and step in deleted)
            if isinstance(replaced, Mapping) and step in replaced:
                overrides, removed = replaced[step], True
            elif step in overrides:
                overrides = overrides[step]
            else:
                return False if removed else None
        elif not isinstance(overrides, (list, tuple)):
            return True if i > 0 else None

    return True if place else None


def merge_layers(base: Mapping[str, object], layers: Iterable[Layer]) -> dict[str, object]:
    """Return ``base`` with all layers merged into it in order.

    :raises AssetCardError: a layer is not a mapping, or a directive has the wrong form.
    """
    merged = dict(base)
    for layer in layers:
        if not isinstance(layer.overrides, Mapping):
            raise AssetCardError(
                layer.owner, f"{layer.where}: expected a mapping, found {show(layer.overrides)}. Correct it there."
            )
        try:
            merged = merge(merged, layer.overrides, path=layer.where)
        except ValueError as error:
            raise AssetCardError(layer.owner, str(error)) from None

    return merged


def merge(base: Mapping[str, object], overrides: Mapping[str, object], *, path: str) -> dict[str, object]:
    """Return ``base`` with ``overrides`` merged into it, nested mappings included; neither is modified.

    At every level, ``_del_`` is a list of keys of ``base`` that are removed first, and ``_set_`` a mapping whose values
    replace those of ``base`` as a whole, last.

    :param path: the location of ``overrides``, for the error.

    :raises ValueError: a directive has the wrong form.
    """
    deleted = overrides.get("_del_")
    if deleted is None:
        deleted = []
    elif not isinstance(deleted, list) or not all(isinstance(key, str) for key in deleted):
        raise ValueError(f"{path}._del_: expected a list of keys, found {_shown(deleted)}.")

    replaced = overrides.get("_set_")
    if replaced is None:
        replaced = {}
    elif not isinstance(replaced, Mapping):
        raise ValueError(f"{path}._set_: expected a mapping, found {_shown(replaced)}.")

    merged = {key: deepcopy(value) for key, value in base.items() if key not in deleted}
    for key, value in overrides.items():
        if key in ("_del_", "_set_"):
            continue
        if isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = merge(below if isinstance(below, Mapping) else {}, value, path=join(path, key))
        else:
            merged[key] = deepcopy(value)
    merged.update(deepcopy(dict(replaced)))

    return merged


def _shown(value: object) -> str:
    return f"[{', '.join(map(show, value[:5]))}]" if isinstance(value, list) else show(value)


# --- the environment -------------------------------------------------------------------------------------------------


class EnvText(str):
    """Text of a card that refers to environment variables, unexpanded.

    Messages and listings show this text, not the values of the variables.
    """

    __slots__ = ()

    def expand(self, environ: Mapping[str, str]) -> str:
        """Return the text with ``${env:VAR}`` and ``${env:VAR:default}`` expanded.

        An unset variable without a default expands to nothing, as in fairseq2.
        """
        return _ENV.sub(lambda match: environ.get(match[1], match[2] or ""), self)


def expand_env(value: object, environ: Mapping[str, str]) -> object:
    """Return ``value`` with every :class:`EnvText` in it expanded."""
    return _map_strings(value, lambda text: text.expand(environ) if isinstance(text, EnvText) else text)


def _mark_env(value: object) -> object:
    """Return ``value`` with each string that refers to the environment, except keys, as an :class:`EnvText`."""
    return _map_strings(value, lambda text: EnvText(text) if _ENV.search(text) else text)


def _map_strings(value: object, change: Callable[[str], str]) -> object:
    match value:
        case str():
            return change(value)
        case Mapping():
            return {key: _map_strings(item, change) for key, item in value.items()}
        case list():
            return [_map_strings(item, change) for item in value]
        case _:
            return value


_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::([^}]*))?\}")
