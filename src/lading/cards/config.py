"""Configurations: a family's defaults, an architecture's values and a card's overrides, merged and validated.

Values are converted as fairseq2 0.8.1 (``fairseq2.utils.structured``) converts them, if nothing is lost: ``16.0`` and
``"16"`` are valid for an ``int`` (environment variables are strings), ``16.5`` and ``true`` are not. A card
states a member of an enum by its name or its value, and a ``torch.dtype`` or ``torch.device`` by its name.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from enum import Enum
from functools import lru_cache, partial
from typing import Any, TypeVar, get_type_hints
from uuid import uuid4

# pydantic imports this module with the first schema of a dataclass, which would otherwise happen during a load.
import pydantic.dataclasses  # noqa: F401
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, PydanticKnownError, SchemaValidator
from pydantic_core.core_schema import no_info_before_validator_function

from lading.cards.card import TOKENIZER_CONFIG_KEYS, Architecture, AssetCard
from lading.cards.config_values import dataclass_in
from lading.cards.documents.document import join, show
from lading.cards.overrides import (
    EnvText,
    Layer,
    architecture_layers,
    expand_env,
    file_layer,
    last_layer,
    layers_of,
    merge_layers,
)
from lading.errors import AssetCardError, InternalError, did_you_mean

T = TypeVar("T")


def architecture_config(architecture: Architecture, config_kls: type[T]) -> T:
    """Return the configuration of an architecture, as a new object.

    :raises AssetCardError: its values do not fit ``config_kls``.
    """
    of = f"the {architecture.family} architecture {architecture.name!r}"

    return _resolve(architecture_layers(architecture), config_kls, architecture.name, of)


def resolve_config(
    card: AssetCard, architecture: Architecture | None, config_kls: type[T], described: T | None = None
) -> T:
    """Return the configuration of a card, as a new object.

    It is the configuration of ``architecture`` (by default that of ``config_kls()``) with the overrides of the card's
    chain, from the root base to the card itself. Only the first of :data:`lading.cards.card.CONFIG_KEYS` that any card
    of the chain has is used. ``${env:VAR}`` in overrides is replaced by the environment variable if a number or one of
    a fixed set of words is expected, so that the value of a variable is neither shown nor kept as text.

    :param described: what the ``config.json`` beside the checkpoint describes, in place of ``config_kls()``.

    :raises AssetCardError: overrides do not fit, or use the environment for free text; its ``name`` is that of the card
        with the first such override.
    """
    layers = layers_of(card, architecture)
    if described is not None:
        layers.insert(0, file_layer(asdict(described)))  # type: ignore[call-overload]

    return _resolve(layers, config_kls, card.name, f"the card {card.name!r}")


def tokenizer_config(card: AssetCard, config_kls: type[T]) -> T:
    """Return the configuration of a card's tokenizer, as a new object: that of ``config_kls()`` with the overrides of
    the card's chain, as :func:`resolve_config` merges those of a model.

    :raises AssetCardError: overrides do not fit, or use the environment for free text.
    """
    layers = layers_of(card, None, TOKENIZER_CONFIG_KEYS)

    return _resolve(layers, config_kls, card.name, f"the tokenizer of the card {card.name!r}")


def _resolve(layers: Sequence[Layer], config_kls: type[T], name: str, of: str) -> T:
    try:
        defaults: dict[str, object] = asdict(config_kls())  # type: ignore[call-overload]
    except TypeError as error:
        raise InternalError(
            f"{config_kls.__name__} is expected to be a dataclass with a default for every field: {error}"
        ) from error

    stated = merge_layers(defaults, layers)
    mapping: Any = expand_env(stated, os.environ)
    try:
        config: T = _validator(config_kls).validate_python(mapping)  # type: ignore[arg-type]  # classes are hashable
    except ValidationError as error:
        raise _misfit(error, config_kls, stated, mapping, layers, name, of) from None
    _refuse_free_text(config_kls, stated, layers, of)

    return config


# --- checking --------------------------------------------------------------------------------------------------------


def _misfit(
    error: ValidationError,
    config_kls: type[object],
    stated: Mapping[str, object],
    mapping: Mapping[str, object],
    layers: Sequence[Layer],
    name: str,
    of: str,
) -> AssetCardError:
    """Return the error that lists every unknown key and every wrong value, and names the layer at fault."""
    owners: list[str] = []
    # pydantic reports a value that fits no member of a union once for each member.
    expected: dict[tuple[str, str], list[str]] = {}
    for problem in error.errors(include_url=False):
        place = _place(problem, mapping)
        owner, where = _where(place, layers, config_kls)
        owners.append(name if owner is None else owner)
        expectation, found = _describe(problem, config_kls, place)
        if isinstance(text := _at(stated, place), EnvText):
            found = show(text)
        elif problem["type"] in _QUOTING:
            for _, text in _leaves(stated, EnvText):
                if value := text.expand(os.environ):
                    found = found.replace(value, text)
        expected.setdefault((where, found), []).append(expectation)

    lines = [f"{where}: expected {' or '.join(texts)}, found {found}" for (where, found), texts in expected.items()]
    text = f" {lines[0]}" if len(lines) == 1 else "\n  ".join(["", *lines])

    return AssetCardError(owners[0], f"The configuration of {of} does not fit {config_kls.__name__}:{text}")


def _refuse_free_text(config_kls: type[T], stated: Mapping[str, object], layers: Sequence[Layer], of: str) -> None:
    """Require that no environment variable became free text, which messages and exported files would show.

    A field takes free text if it accepts a random string.

    :raises AssetCardError: a variable became free text.
    """
    for place, _ in _leaves(stated, EnvText):
        probe: Any = expand_env(stated, os.environ)
        _at(probe, place[:-1])[place[-1]] = f"{uuid4()}"
        try:
            _validator(config_kls).validate_python(probe)  # type: ignore[arg-type]
        except ValidationError:
            continue
        owner, where = _where(place, layers, config_kls)
        raise AssetCardError(
            owner or "",
            f"The configuration of {of} asks for text of the environment: {where}: expected the text itself, found "
            f"{show(_at(stated, place))}. Environment variables can only give numbers and words of a fixed set, as "
            "other values would be shown and kept.",
        )


def _where(place: _Place, layers: Sequence[Layer], config_kls: type[object]) -> tuple[str | None, str]:
    """Return the owner of the layer that states the value at ``place`` (``None`` if none does), and its dotted path."""
    layer = last_layer(layers, place)
    where = config_kls.__name__ if layer is None else layer.where
    for step in place:
        where = f"{where}[{step}]" if isinstance(step, int) else join(where, step)

    return None if layer is None else layer.owner, where


def _at(value: Any, place: _Place) -> Any:
    """Return the value at ``place`` inside ``value``; ``None`` if it does not exist."""
    for step in place:
        try:
            value = value[step]
        except (LookupError, TypeError):
            return None

    return value


def _leaves(value: object, kls: type[T], place: _Place = ()) -> Iterator[tuple[_Place, T]]:
    """Yield all values of a type inside mappings and lists, with their places."""
    if isinstance(value, kls):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, kls, (*place, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, kls, (*place, i))


_Place = tuple[str | int, ...]


def _place(problem: ErrorDetails, mapping: Mapping[str, object]) -> _Place:
    """Return the steps through ``mapping`` to the wrong value; unlike pydantic's, without the members of unions."""
    place: list[str | int] = []
    value: Any = mapping
    for step in problem["loc"]:
        try:
            value = value[step]
        except (LookupError, TypeError):
            continue
        place.append(step)

    return tuple(place)


_QUOTING = ("value_error", "assertion_error")
"""The pydantic error types whose message comes from a family, and may quote any value."""

_EXPECTED: Mapping[str, str] = {
    "bool_type": "true or false",
    "dataclass_type": "a mapping",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer",
    "int_type": "an integer",
    "list_type": "a list",
    "none_required": "null",
    "path_type": "a path",
    "string_type": "a string",
    "tuple_type": "a list",
}
"""The expected value, by pydantic's error type."""


def _describe(problem: ErrorDetails, config_kls: type[object], place: _Place) -> tuple[str, str]:
    """Return descriptions of the expected and of the found value."""
    found = show(problem["input"])
    context = problem.get("ctx", {})
    match problem["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            kls = _class_at(config_kls, place[:-1])
            hint = did_you_mean(str(place[-1]), [] if kls is None else [f.name for f in fields(kls) if f.init])
            return f"a field of {(kls or config_kls).__name__}", f"an unknown key{hint and '.' + hint}"
        case "missing" if isinstance(name := problem["loc"][-1], str):
            return f"a value for {name!r}", "none"
        case "missing":
            return "a longer list", f"one of {problem['loc'][-1]}"
        case "too_long":
            return f"a list of {context['max_length']}", f"one of {context['actual_length']}"
        case "literal_error" | "enum":
            return str(context["expected"]), found
        case "is_instance_of":
            return f"the name of a {context['class']}", found
        case kind if kind in _QUOTING:
            return "values that fit together", f"some that do not: {context['error']}"
        case other:
            return _EXPECTED.get(other) or problem["msg"].removeprefix("Input should be "), found


def _class_at(kls: Any, place: _Place) -> Any:
    """Return the dataclass of the value at ``place`` inside a ``kls``; ``None`` if it is not a dataclass."""
    for step in place:
        if isinstance(step, str) and kls is not None:
            kls = dataclass_in(get_type_hints(kls).get(step))

    return kls


@lru_cache(maxsize=256)
def _validator(config_kls: type[Any]) -> SchemaValidator:
    return SchemaValidator(_schema(config_kls))


def _schema(config_kls: type[object]) -> CoreSchema:
    """Return pydantic's schema of the class, made strict.

    :raises InternalError: the class has fields of types that pydantic does not support.
    """
    try:
        # If the schema could not be built, pydantic returns a mock that raises the reason when it is read.
        # A dataclass by itself takes no settings, but hands on those of the type that it is a part of.
        adapter = TypeAdapter[Any](config_kls | None, config=ConfigDict(arbitrary_types_allowed=True))  # type: ignore[arg-type]
        return _strict(dict(adapter.core_schema))  # type: ignore[return-value]
    except (PydanticUserError, NameError) as error:
        raise InternalError(f"The fields of {config_kls.__name__} cannot be checked: {error}") from error


def _strict(schema: object) -> object:
    """Return ``schema`` without the conversions that hide mistakes, and with unknown keys forbidden in all classes.

    pydantic's strict mode would also refuse numbers in strings, and does not apply to classes of other packages.
    """
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema

    strict: Any = {key: value if key in ("default", "metadata") else _strict(value) for key, value in schema.items()}
    match schema.get("type"):
        case "dataclass-args":
            return {**strict, "extra_behavior": "forbid"}
        case "bool":
            return {**strict, "strict": True}
        case "int":
            return no_info_before_validator_function(_integer, strict)
        case "float":
            return no_info_before_validator_function(_number, strict)
        case "enum":
            return no_info_before_validator_function(partial(_member, schema["cls"]), strict)
        case "is-instance" if schema["cls"].__module__ == "torch":
            return no_info_before_validator_function(partial(_named, schema["cls"]), strict)
        case "is-instance" if schema["cls"].__module__.partition(".")[0] not in sys.stdlib_module_names:
            raise PydanticUserError(f"a card cannot state a {schema['cls'].__name__}", code=None)

    return strict


def _integer(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")

    return value


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    # A default may be infinite; a value from a card or the environment may not.
    if isinstance(value, str) and not math.isfinite(_float(value)):
        raise PydanticKnownError("finite_number")

    return value


def _member(kls: type[Enum], value: object) -> object:
    return kls.__members__.get(value, value) if isinstance(value, str) else value


def _named(kls: Callable[[str], object], value: object) -> object:
    """Return the ``torch.dtype`` or ``torch.device`` of this name; another value as it is, which pydantic reports."""
    if not isinstance(value, str):
        return value
    found = getattr(sys.modules["torch"], value.removeprefix("torch."), None)  # as the class is, torch is imported
    if isinstance(found, kls):  # type: ignore[arg-type]
        return found
    try:
        return kls(value)
    except (RuntimeError, TypeError):  # not a device, or dtypes cannot be called
        return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        # pydantic reports it.
        return 0.0
