"""Configurations ↔ Hugging Face's ``config.json``, a table for both directions.

The meaning of the keys, and what holds where one is absent, is that of the configuration classes of transformers.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, Final, Generic, NoReturn, TypeGuard, TypeVar

from lading.errors import InternalError, ModelCheckpointMismatchError, NotSupportedError
from lading.families.nn.checks import MAX_LAYERS, MAX_SIZE
from lading.formats.config_json import quantization_of

log = logging.getLogger("lading")

ConfigT = TypeVar("ConfigT")

BY_ITS_OWN_CLASS = (
    "`get_hg_model_hub().load_model(…)` loads it by its own class of transformers; in a card: `model_family: hg`."
)
"""The advice for what a family does not support."""


def _for_reason(reason: str, keys: str) -> dict[str, str]:
    return dict.fromkeys(keys.split(), reason)


IGNORED_KEYS: Final[Mapping[str, str]] = {
    **_for_reason("by these the family was chosen", "architectures model_type"),
    **_for_reason("code of the repository is never run", "auto_map"),
    **_for_reason("where the file comes from", "_name_or_path name_or_path _commit_hash transformers_version"),
    **_for_reason("what wrote the file", "unsloth_fixed unsloth_version"),
    **_for_reason("read where the dtype of a load is chosen", "dtype torch_dtype"),
    **_for_reason("the form of what a forward returns", "return_dict output_attentions output_hidden_states"),
    **_for_reason("how transformers computes the same", "use_cache cache_implementation chunk_size_feed_forward"),
    **_for_reason("how transformers computes the same", "attn_implementation _attn_implementation pretraining_tp"),
    **_for_reason("random weights, which a load replaces", "initializer_range initializer_factor"),
    **_for_reason("training", "attention_dropout hidden_dropout classifier_dropout gradient_checkpointing"),
    **_for_reason("the tokenizer says it", "bos_token_id eos_token_id sep_token_id"),
    **_for_reason("heads that these families do not have", "id2label label2id num_labels problem_type"),
    **_for_reason("text generation", "max_length do_sample temperature top_k top_p repetition_penalty"),
    **_for_reason("only a class for encoder and decoder reads it", "is_encoder_decoder tie_encoder_decoder"),
}
"""The keys that no family reads, and the reasons."""

CHANGES_EACH_MODEL: Final[Mapping[str, object]] = {"per_layer_config": None, "attribute_map": None}
"""The keys that change the results of transformers, with the only value that a family supports."""


class ConfigReader:
    """The keys of a ``config.json``, checked as they are read.

    :param family: the family that reads, for messages.
    :param table: what the family does with each key; ``None`` where only some are read.

    :raises NotSupportedError: a key of ``table.required`` has another value.
    :raises ModelCheckpointMismatchError: (all methods that read a key) its value is of another type.
    """

    def __init__(
        self, values: Mapping[str, object], family: str, prefix: str = "", table: ConfigTable[Any] | None = None
    ) -> None:
        self._values = values
        self._family = family
        self._prefix = prefix
        self._known: set[str] | None = None

        if table is None:
            return
        for key, value in table.required.items():
            self.require(key, value)
        if table.open:
            return
        self._known = {key for entry in table.entries for key in entry.keys}
        self._known |= table.required.keys() | {"quantization_config"}
        known = self._known | table.ignored.keys() | IGNORED_KEYS.keys()
        if unknown := sorted(key for key, value in values.items() if key not in known and value):
            log.warning(
                "config.json: the %s family does not know %s, and loads as if it were not there.",
                family,
                ", ".join(f"{prefix}{key}" for key in unknown),
            )

    def _get(self, key: str, default: object = None) -> object:
        if self._known is not None and key not in self._known:
            raise InternalError(f"the {self._family} family reads {key!r}, which is not in its table of keys")

        return self._values.get(key, default)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def values(self) -> dict[str, object]:
        """Return all keys with their values."""
        return dict(self._values)

    def is_null(self, key: str) -> bool:
        """Return whether the key is absent or null."""
        return self._get(key) is None

    def count(self, key: str, default: int) -> int:
        """Read a positive integer."""
        value = self._get(key, default)
        if type(value) is not int or value < 1:
            self.mismatch(key, "a positive integer")
        if value > MAX_SIZE:
            self.mismatch(key, f"a positive integer, at most {MAX_SIZE}")

        return value

    def count_or_zero(self, key: str, default: int) -> int:
        """Read an integer that is not negative."""
        value = self._get(key, default)

        return 0 if type(value) is int and value == 0 else self.count(key, default)

    def layers(self, key: str, default: int) -> int:
        """Read a number of layers, within the supported range."""
        if (value := self.count(key, default)) > MAX_LAYERS:
            self.mismatch(key, f"a number of layers, at most {MAX_LAYERS}")

        return value

    def maybe_count(self, key: str, default: int | None) -> int | None:
        """Read a positive integer, or null."""
        return None if self._get(key, default) is None else self.count(key, default or 0)

    def index(self, key: str, default: int | None) -> int | None:
        """Read an integer, or null; a negative one means the same as null."""
        value = self._get(key, default)
        if value is None:
            return None
        if type(value) is not int:
            self.mismatch(key, "an integer or null")

        return value if value >= 0 else None

    def number(self, key: str, default: float | None) -> float:
        """Read a finite number that is not negative; it is required if ``default`` is ``None``."""
        value = self._get(key, default)
        if not _is_number(value):
            self.mismatch(key, "a finite number that is not negative")

        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Read a boolean."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.mismatch(key, "true or false")

        return value

    def choice(self, key: str, default: str, choices: Mapping[str, str]) -> str:
        """Read a string, and return its value in ``choices``.

        :raises NotSupportedError: it says nothing.
        """
        value = self._get(key, default)
        if not isinstance(value, str):
            self.mismatch(key, "a string")
        if value not in choices:
            self.refuse(key, value, choices)

        return choices[value]

    def counts(self, key: str, default: Sequence[int]) -> list[int]:
        """Read a list of positive integers."""
        value = self._get(key, list(default))
        if not isinstance(value, list) or not all(type(v) is int and v > 0 for v in value):
            self.mismatch(key, "a list of positive integers")
        if max(value, default=0) > MAX_SIZE:
            self.mismatch(key, f"a list of positive integers, each at most {MAX_SIZE}")

        return value

    def indices(self, key: str, default: None = None) -> list[int]:
        """Read a list of integers that are not negative; null means an empty one."""
        value = self._get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
            self.mismatch(key, "a list of integers that are not negative")

        return value

    def pair(self, key: str, default: int) -> tuple[int, int]:
        """Read two positive integers, or one that stands for both."""
        found = self.counts(key, ()) if isinstance(self._get(key), list) else 2 * [self.count(key, default)]
        if len(found) != 2:
            self.mismatch(key, "a positive integer, or two")

        return found[0], found[1]

    def numbers(self, key: str) -> list[float] | None:
        """Read a list of finite numbers that are not negative, or null."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(map(_is_number, value)):
            self.mismatch(key, "a list of finite numbers that are not negative")

        return [float(v) for v in value]

    def strings(self, key: str) -> list[str] | None:
        """Read a list of strings, or null."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            self.mismatch(key, "a list of strings")

        return value

    def section(self, key: str, table: ConfigTable[Any] | None = None) -> ConfigReader:
        """Return a reader of the keys of an object, without keys if it is absent or null."""
        value = self._get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            self.mismatch(key, "an object")

        return ConfigReader(value, self._family, f"{self._prefix}{key}.", table)

    def require(self, key: str, value: object) -> None:
        """Refuse all values but ``value``, which also is the default of the key.

        Null is accepted too, but not if the default is true: transformers reads null as false.

        :raises NotSupportedError: the file says something else.
        """
        found = self._get(key, value)
        if found != value and (found is not None or value is True):
            self.refuse(key, found, () if value is None else (value,))

    def refuse_quantized(self) -> None:
        """Refuse quantized weights, except for those that a load dequantizes.

        :raises NotSupportedError: the file says that they are.
        """
        if (scheme := quantization_of(self._values)) is not None:
            raise NotSupportedError(
                f"config.json: {self._prefix}quantization_config.quant_method is {scheme!r}: the weights are "
                "quantized, which lading does not load. Use the checkpoint in its original precision."
            )

    def refuse(self, key: str, found: object, supported: Iterable[object] = ()) -> NoReturn:
        """Raise the error for a value that the family does not support.

        :raises NotSupportedError: always.
        """
        known = ", ".join(repr(value) for value in supported)
        raise NotSupportedError(
            f"config.json: {self._prefix}{key} is {found!r}, which the {self._family} family does not support"
            f"{f' (it supports {known})' if known else ''}. {BY_ITS_OWN_CLASS}"
        )

    def mismatch(self, key: str, expected: str) -> NoReturn:
        """Raise the error for a key with an unexpected value.

        :raises ModelCheckpointMismatchError: always.
        """
        what = f"is {self._values[key]!r}" if key in self._values else "is missing"
        raise ModelCheckpointMismatchError(
            "config.json",
            f"config.json: {self._prefix}{key} is expected to be {expected}, but {what}. Compare the file with the one "
            "that the model's publisher offers.",
        )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


# --- both directions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a configuration that corresponds to one key of ``config.json``."""

    name: str
    key: str
    read: Callable[[ConfigReader, str, Any], Any]
    """The method of :class:`ConfigReader` that reads and checks the key."""
    default: Any = None
    """The value if the key is absent."""
    _: KW_ONLY
    null: str | None = None
    """The earlier field whose value applies if the key is null."""
    write: Callable[[Any], object] | None = None
    """The value of the key for a configuration; ``None`` means that of the field."""
    optional: bool = False
    """True if the key is omitted when its value would be null."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The key, as a tuple."""
        return (self.key,)

    def to_fields(self, reader: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the field by its name; ``earlier`` are those of the entries before."""
        value = self.read(reader, self.key, self.default)

        return {self.name: earlier[self.null] if value is None and self.null is not None else value}

    def to_keys(self, config: Any) -> Mapping[str, object]:
        """Return the key with its value for a configuration."""
        value = getattr(config, self.name) if self.write is None else self.write(config)

        return {} if value is None and self.optional else {self.key: value}


@dataclass(frozen=True, slots=True)
class KeyGroup:
    """Keys of ``config.json`` that together determine fields of a configuration."""

    keys: tuple[str, ...]
    to_fields: Callable[[ConfigReader, Mapping[str, Any]], Mapping[str, Any]]
    """The fields by name, from the keys and the fields of the entries before."""
    to_keys: Callable[[Any], Mapping[str, object]]
    """The keys with their values, from a configuration."""


def same_for_all(key: str, *accepted: str) -> KeyGroup:
    """Return the entry of a key, such as that of an activation, that has one meaning in all models of a family.

    :param accepted: the strings of that meaning; the first one holds where the key is absent, and is written.
    """

    def read(reader: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
        reader.choice(key, accepted[0], dict.fromkeys(accepted, ""))

        return {}

    return KeyGroup((key,), read, lambda config: {key: accepted[0]})


Entries = Sequence[Field | KeyGroup]


def read_fields(entries: Entries, reader: ConfigReader) -> dict[str, Any]:
    """Return the fields of a configuration by name, read from a ``config.json``."""
    found: dict[str, Any] = {}
    for entry in entries:
        found |= entry.to_fields(reader, found)

    return found


def keys_of(entries: Entries, config: Any) -> dict[str, object]:
    """Return the keys of ``config.json`` for the fields of a configuration."""
    return {key: value for entry in entries for key, value in entry.to_keys(config).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigTable(Generic[ConfigT]):
    """The configuration of a family ↔ ``config.json`` of a model type, for both directions.

    Dropout of decoders is in neither: it is a matter of training, and published files say zero.
    """

    family: str
    model_type: str
    architecture: str
    """The class of transformers that is written."""
    config_kls: type[ConfigT]
    spec: Callable[[ConfigT], Any]
    """The options of a model, a dataclass, equal for configurations of equal models.

    :raises ValueError: the configuration is not valid.
    """
    free: Collection[str] = ()
    """The options that a file need not describe, because they matter in training only; dropout is always free."""
    entries: Entries
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """The fields without a key, with the value of all models of the type."""
    constants: Mapping[str, object] = field(default_factory=dict)
    """The keys that are written with the same value for all models, except those of ``entries``."""
    required: Mapping[str, object]
    """The keys that change the results of transformers, with the only value that the family supports, which also is the
    default of the key."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """The keys that do not change the results of a model, and the reasons."""
    open: bool = False
    """True if a file may have any other key, too; otherwise each is logged."""

    def read(self, values: Mapping[str, object]) -> ConfigT:
        """Return the configuration that a ``config.json`` describes.

        :raises NotSupportedError: the weights are quantized, or the family does not support the value of a key.
        :raises ModelCheckpointMismatchError: a value is of another type, or they describe no model.
        """
        return self.read_keys(ConfigReader(values, self.family, table=self))

    def read_keys(self, reader: ConfigReader) -> ConfigT:
        """Return the same for a reader that was made with this table."""
        reader.refuse_quantized()
        config = self.config_kls(**self.fixed, **read_fields(self.entries, reader))
        try:
            self.spec(config)
        except ValueError as error:
            raise ModelCheckpointMismatchError(
                "config.json",
                f"config.json does not describe a model of the {self.family} family: {error}. Compare the file with "
                "the one that the model's publisher offers.",
            ) from None

        return config

    def stated(self, values: Mapping[str, object]) -> frozenset[str]:
        """Return the fields that a ``config.json`` states itself; the others have defaults.

        :raises NotSupportedError: as :meth:`read`; likewise the other errors.
        """
        reader = ConfigReader(values, self.family)
        found: dict[str, Any] = {}
        stated: set[str] = set()
        for entry in self.entries:
            made = entry.to_fields(reader, found)
            found |= made
            if any(key in reader for key in entry.keys):
                stated.update(made)

        return frozenset(stated)

    def write(self, config: ConfigT) -> dict[str, object]:
        """Return the ``config.json`` that describes a model of the configuration.

        :raises NotSupportedError: no such file describes it, as Hugging Face's models of this type cannot be like that.
        :raises ValueError: sizes that make no model.
        """
        meant = self.spec(config)  # first, as it bounds the sizes
        values = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **self.constants,
            **keys_of(self.entries, config),
        }

        read = self.spec(self.read(values))
        for name in (f.name for f in fields(meant) if f.name not in self.free):
            if name.endswith(("dropout_p", "drop_p")) or getattr(meant, name) == getattr(read, name):
                continue
            raise NotSupportedError(
                f"A config.json of the type {self.model_type!r} cannot describe this configuration of the "
                f"{self.family} family: `{name}` is {getattr(meant, name)!r}, but would be read as "
                f"{getattr(read, name)!r}. Models like that have no form that transformers loads."
            )

        return values
