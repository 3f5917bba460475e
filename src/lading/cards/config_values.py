"""The values of a configuration as a listing shows them: complete, but not validated.

A listing needs neither pydantic nor the values of environment variables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, get_args, get_type_hints

from lading.cards.overrides import Layer, last_layer, merge_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigValue:
    """A value of a configuration that has no values below it."""

    path: str
    """The dotted path."""
    value: object
    layer: Layer | None
    """The last layer that states the value; ``None`` for a default of the configuration class."""


def config_values(layers: Sequence[Layer], config_kls: type[object] | None) -> dict[str, object]:
    """Return all values of a configuration, in the order of its class.

    :param config_kls: the family's class; if it is ``None``, only the values that the layers state are returned.

    :raises AssetCardError: a layer is not a mapping, or a directive has the wrong form.
    """
    return _completed(merge_layers(_defaults(config_kls), layers), config_kls)


def iter_values(config: Mapping[str, object], layers: Sequence[Layer]) -> Iterator[ConfigValue]:
    """Yield the values of ``config``, nested ones by themselves, and where each of them comes from."""

    def below(mapping: Mapping[str, object], place: tuple[str, ...]) -> Iterator[ConfigValue]:
        for name, value in mapping.items():
            here = (*place, name)
            if isinstance(value, Mapping) and value:
                yield from below(value, here)
            else:
                yield ConfigValue(path=".".join(here), value=value, layer=last_layer(layers, here))

    return below(config, ())


def dataclass_in(annotation: Any) -> Any:
    """Return the first dataclass in ``annotation``; ``None`` without one."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        return annotation

    return next((kls for arg in get_args(annotation) if (kls := dataclass_in(arg)) is not None), None)


def _completed(values: Mapping[str, object], kls: type[object] | None) -> dict[str, object]:
    """Return ``values`` with the defaults of the classes that a validation would add, such as for deleted keys."""
    hints = get_type_hints(kls) if kls is not None else {}

    return _defaults(kls) | {
        name: _completed(value, nested)
        if isinstance(value, Mapping) and (nested := dataclass_in(hints.get(name))) is not None
        else value
        for name, value in values.items()
    }


def _defaults(kls: type[object] | None) -> dict[str, object]:
    if kls is None:
        return {}
    try:
        return asdict(kls())  # type: ignore[call-overload, no-any-return]
    except TypeError:  # a field without a default
        return {}
