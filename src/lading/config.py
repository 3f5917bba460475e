"""Configurations: the defaults of a family's class, an architecture's numbers, a card's overrides; merged and checked.

The merge and its directives are those of fairseq2 0.8.1 (``fairseq2.utils.config``); so are the conversions, where they
lose nothing: ``16.0`` and ``"16"`` are good for an ``int`` (variables of the environment are strings), ``16.5`` and
``true`` are not.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any, Final, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticKnownError, SchemaValidator
from pydantic_core.core_schema import DataclassSchema, no_info_before_validator_function

from lading.card import CONFIG_KEYS, Architecture, AssetCard
from lading.documents import join, show
from lading.errors import AssetCardError, InternalError, did_you_mean

T = TypeVar("T")

STRICT: Final = ConfigDict(extra="forbid")
"""For the ``__pydantic_config__`` of configuration classes: keys that they don't have are errors."""


def architecture_config(architecture: Architecture, config_kls: type[T]) -> T:
    """The configuration of an architecture: a new object each time.

    :raises AssetCardError: its numbers don't fit ``config_kls``.
    """
    of = f"the {architecture.family} architecture {architecture.name!r}"

    return _resolve(_architecture_layers(architecture), config_kls, architecture.name, of)


def resolve_config(card: AssetCard, architecture: Architecture | None, config_kls: type[T]) -> T:
    """The configuration of a card: a new object each time.

    It is that of ``architecture`` (without one, the defaults of ``config_kls``), with the overrides of the card's chain
    from the root base to the card itself. Of :data:`lading.card.CONFIG_KEYS`, the first that any card of the chain has
    is used alone. ``${env:VAR}`` in overrides is replaced from the environment of the process.

    :raises AssetCardError: overrides that don't fit; its ``name`` is that of the card that states the first of them.
    """
    layers = [] if architecture is None else _architecture_layers(architecture)

    chain = list(card.chain())
    for key in CONFIG_KEYS:
        stated = [each for each in reversed(chain) if each.metadata.get(key) is not None]
        layers += (_card_layer(each, key) for each in stated)
        if stated:
            break

    return _resolve(layers, config_kls, card.name, f"the card {card.name!r}")


def structure(config_kls: type[T], mapping: Mapping[str, object], *, where: str) -> T:
    """An instance of ``config_kls`` from a mapping of its fields.

    :param where: what ``mapping`` is, for the error: ``qwen.yaml[3].model_config``.

    :raises AssetCardError: (named ``where``) it does not fit; every unknown key and every wrong value is listed.
    """
    return _structure(config_kls, mapping, [_Layer(mapping, where, where)], where, where)


def json_schema(config_kls: type[object]) -> dict[str, Any]:
    """The JSON Schema of the mappings that :func:`structure` takes."""
    return _JsonSchema().generate(_schema(config_kls))


# --- layers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layer:
    """Overrides, and who states them."""

    overrides: object
    where: str
    owner: str


def _architecture_layers(architecture: Architecture) -> list[_Layer]:
    count = len(architecture.overrides)
    sources = [*architecture.sources, *("" for _ in range(count))][:count]

    return [
        _Layer(overrides, f"{source or architecture.name}.config", architecture.name)
        for overrides, source in zip(architecture.overrides, sources, strict=True)
    ]


def _card_layer(card: AssetCard, key: str) -> _Layer:
    overrides = expand_env(card.metadata[key], os.environ)

    return _Layer(overrides, f"{card.source_of(key) or card.name}.{key}", card.name)


def _resolve(layers: Sequence[_Layer], config_kls: type[T], name: str, of: str) -> T:
    try:
        merged: dict[str, object] = asdict(config_kls())  # type: ignore[call-overload]
    except TypeError as error:
        raise InternalError(
            f"{config_kls.__name__} is expected to be a dataclass with a default for every field: {error}"
        ) from error

    for layer in layers:
        if not isinstance(layer.overrides, Mapping):
            raise AssetCardError(layer.owner, f"{layer.where}: expected a mapping, found {show(layer.overrides)}.")
        try:
            merged = merge(merged, layer.overrides, path=layer.where)
        except ValueError as error:
            raise AssetCardError(layer.owner, str(error)) from None

    return _structure(config_kls, merged, layers, name, of)


# --- merging ---------------------------------------------------------------------------------------------------------


def merge(base: Mapping[str, object], overrides: Mapping[str, object], *, path: str) -> dict[str, object]:
    """``base`` with ``overrides`` laid over it, mappings within mappings likewise; both stay as they are.

    At every level, ``_del_`` is a list of keys of ``base`` to leave out first, and ``_set_`` a mapping whose values
    replace what is there, whole, at last.

    :param path: where ``overrides`` stands, for the error.

    :raises ValueError: a directive of the wrong form.
    """
    deleted = overrides.get("_del_")
    if deleted is None:
        deleted = []
    elif not isinstance(deleted, list) or not all(isinstance(key, str) for key in deleted):
        raise ValueError(f"{path}._del_: expected a list of keys, found {_show_items(deleted)}.")

    replaced = overrides.get("_set_")
    if replaced is None:
        replaced = {}
    elif not isinstance(replaced, Mapping):
        raise ValueError(f"{path}._set_: expected a mapping, found {show(replaced)}.")

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


def _show_items(value: object) -> str:
    """A list with its first items, as it is one of them that is wrong."""
    return f"[{', '.join(map(show, value[:5]))}]" if isinstance(value, list) else show(value)


_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::([^}]*))?\}")


def expand_env(value: object, environ: Mapping[str, str]) -> object:
    """``value`` with ``${env:VAR}`` and ``${env:VAR:default}`` replaced in all of its strings, keys apart.

    A variable that is not set and has no default is empty, as in fairseq2.
    """
    match value:
        case str():
            return _ENV.sub(lambda match: environ.get(match[1], match[2] or ""), value)
        case Mapping():
            return {key: expand_env(item, environ) for key, item in value.items()}
        case list():
            return [expand_env(item, environ) for item in value]
        case _:
            return value


# --- checking --------------------------------------------------------------------------------------------------------


def _structure(config_kls: type[T], mapping: Mapping[str, object], layers: Sequence[_Layer], name: str, of: str) -> T:
    """An instance of ``config_kls``; the error says which of ``layers``, whose sum ``mapping`` is, is to blame."""
    try:
        config: T = _validator(config_kls).validate_python(mapping)  # type: ignore[arg-type]  # classes are hashable
    except ValidationError as error:
        problems = error.errors(include_url=False)
    else:
        return config

    owners: list[str] = []
    # A value that fits none of several types is a problem for each of them.
    expected: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        place = _place(problem, mapping)
        layer = next((each for each in reversed(layers) if _states(each.overrides, place)), None)
        owners.append(name if layer is None else layer.owner)

        where = config_kls.__name__ if layer is None else layer.where
        for step in place:
            where = f"{where}[{step}]" if isinstance(step, int) else join(where, step)
        expectation, found = _describe(problem, config_kls, place)
        expected.setdefault((where, found), []).append(expectation)

    lines = [f"{where}: expected {' or '.join(texts)}, found {found}" for (where, found), texts in expected.items()]
    text = lines[0] if len(lines) == 1 else "\n  ".join(["", *lines])
    raise AssetCardError(owners[0], f"The configuration of {of} does not fit {config_kls.__name__}: {text}")


_Place = tuple[str | int, ...]


def _place(problem: ErrorDetails, mapping: Mapping[str, object]) -> _Place:
    """The steps that lead through ``mapping`` to the wrong value; pydantic's own also name members of unions."""
    place: list[str | int] = []
    value: Any = mapping
    for step in problem["loc"]:
        try:
            value = value[step]
        except (LookupError, TypeError):
            continue
        place.append(step)

    return tuple(place)


def _states(overrides: object, place: _Place) -> bool:
    """Whether ``overrides`` state the value at ``place``, or one that it is a part of."""
    for i, step in enumerate(place):
        if isinstance(overrides, Mapping):
            replaced = overrides.get("_set_")
            if isinstance(replaced, Mapping) and step in replaced:
                overrides = replaced[step]
            elif step in overrides:
                overrides = overrides[step]
            else:
                return False
        elif not isinstance(overrides, (list, tuple)):
            return i > 0

    return bool(place)


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
    "string_type": "a string",
    "tuple_type": "a list",
}
"""What is expected, by pydantic's type of error."""


def _describe(problem: ErrorDetails, config_kls: type[object], place: _Place) -> tuple[str, str]:
    """What was expected, and what was found."""
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
        case "value_error" | "assertion_error":
            return "values that fit together", f"some that do not: {context['error']}"
        case other:
            return _EXPECTED.get(other) or problem["msg"].removeprefix("Input should be "), found


def _class_at(kls: Any, place: _Place) -> Any:
    """The dataclass of the value at ``place`` inside a ``kls``; ``None`` where it is not a dataclass."""
    for step in place:
        if isinstance(step, str) and kls is not None:
            kls = _dataclass_in(get_type_hints(kls).get(step))

    return kls


def _dataclass_in(annotation: Any) -> Any:
    """The first dataclass that ``annotation`` is made of."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        return annotation

    return next((kls for arg in get_args(annotation) if (kls := _dataclass_in(arg)) is not None), None)


@lru_cache(maxsize=256)
def _validator(config_kls: type[Any]) -> SchemaValidator:
    return SchemaValidator(_schema(config_kls))


def _schema(config_kls: type[object]) -> CoreSchema:
    """The schema that pydantic makes of the class, but strict.

    :raises InternalError: the class has fields of types that pydantic does not know.
    """
    try:
        schema = TypeAdapter(config_kls).core_schema
    except (PydanticUserError, NameError) as error:
        raise InternalError(f"The fields of {config_kls.__name__} cannot be checked: {error}") from error

    return _strict(schema)  # type: ignore[return-value]


def _strict(schema: object) -> object:
    """``schema`` without the conversions that hide mistakes, and with no class that takes unknown keys.

    pydantic's own strict mode would refuse numbers in strings, too, and does not reach the classes of others.
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

    return strict


class _JsonSchema(GenerateJsonSchema):
    """With what :func:`_strict` says of unknown keys, which pydantic looks up in the class."""

    def dataclass_schema(self, schema: DataclassSchema) -> JsonSchemaValue:
        return {**super().dataclass_schema(schema), "additionalProperties": False}


def _integer(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")

    return value


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    # A default may be infinite; what a card says, or the environment for it, may not.
    if isinstance(value, str) and not math.isfinite(_float(value)):
        raise PydanticKnownError("finite_number")

    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        # pydantic says it better.
        return 0.0
