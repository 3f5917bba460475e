"""The reading of Hugging Face checkpoints, shared by the families: keys of ``config.json`` and names of tensors.

The meaning of the keys, and what holds where one is absent, is that of the configuration classes of transformers.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, Final, Generic, Literal, NoReturn, TypeVar, cast, get_args

from lading.errors import InternalError, ModelCheckpointMismatchError, NotSupportedError
from lading.families.nn.checks import MAX_LAYERS, MAX_SIZE, require_layers
from lading.planning.rules import Rule

log = logging.getLogger("lading")

ConfigT = TypeVar("ConfigT")

_BY_ITS_OWN_CLASS = (
    "`get_hg_model_hub().load_model(…)` loads it by its own class of transformers; in a card: `model_family: hg`."
)

LayerType = Literal["sliding_attention", "full_attention"]
"""The kind of attention in a layer, with or without a window."""

HEAD = re.compile(r"(lm_head|score|classifier|qa_outputs|v_head|value_head|regression_head)\..*")
"""The names of parameters of a head, after the last layer."""


def explain_head(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """Return advice for a checkpoint of a decoder with another head than that of a language model, or without a head.

    :param missing: names of parameters that it lacks.
    :param unexpected: names of tensors that no rule knows.
    """
    if not (missing or unexpected) or not all(HEAD.fullmatch(name) for name in (*missing, *unexpected)):
        return None
    what = "has another head than a language model" if unexpected else "has no head"

    return f"The checkpoint {what}: see `architectures` in its config.json. {_BY_ITS_OWN_CLASS}"


DECODER_RULES: Final[Sequence[Rule]] = (
    # Old versions of transformers save these computed buffers.
    Rule("{prefix*}rotary_emb.inv_freq", None),
    Rule("rotary_emb.inv_freq", None),
    # Heads that draft further tokens, which transformers skips too.
    Rule("mtp.{rest*}", None),
    Rule("model.mtp.{rest*}", None),
    # A checkpoint of the model without its head lacks the prefix.
    Rule("embed_tokens.weight", "model.embed_tokens.weight"),
    Rule("layers.{n}.{rest*}", "model.layers.{n}.{rest}"),
    Rule("norm.weight", "model.norm.weight"),
)


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

CHANGES_EACH_DECODER: Final[Mapping[str, object]] = {
    **CHANGES_EACH_MODEL,
    "is_causal": True,
    "partial_rotary_factor": 1.0,
    "attention_chunk_size": None,
    "_rope_type_labels": None,
}
"""The same for decoders."""

NO_WINDOWS: Final[Mapping[str, object]] = {"layer_types": None, "sliding_window": None}
"""The keys with which transformers shortens its cache in generation, even without layers that have a window."""

NO_SCALING: Final[Mapping[str, str]] = {"original_max_position_embeddings": "only for scaling, which is not supported"}
"""The keys that a family without scaled rotary frequencies ignores."""

NO_TOKENS: Final[Mapping[str, object]] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""The keys that belong to the tokenizer, unless a family reads one."""


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
        self._known: Collection[str] | None = None

        if table is None:
            return
        self._known = table.honored() | table.required.keys()
        for key, value in table.required.items():
            self.require(key, value)
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
        """All keys with their values."""
        return dict(self._values)

    def is_null(self, key: str) -> bool:
        """Return whether the key is absent or null."""
        return self._get(key) is None

    def count(self, key: str, default: int) -> int:
        """Read a positive integer."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.mismatch(key, "a positive integer")
        if value > MAX_SIZE:
            self.mismatch(key, f"a positive integer, at most {MAX_SIZE}")

        return value

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
        if not isinstance(value, int) or isinstance(value, bool):
            self.mismatch(key, "an integer or null")

        return value if value >= 0 else None

    def number(self, key: str, default: float | None) -> float:
        """Read a finite number that is not negative; it is required if ``default`` is ``None``."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
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
        if not isinstance(value, list) or not all(
            isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value
        ):
            self.mismatch(key, "a list of positive integers")
        if max(value, default=0) > MAX_SIZE:
            self.mismatch(key, f"a list of positive integers, each at most {MAX_SIZE}")

        return value

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
        """Refuse quantized weights.

        :raises NotSupportedError: the file says that they are.
        """
        if not self.is_null("quantization_config"):
            scheme = self.section("quantization_config")._get("quant_method")
            raise NotSupportedError(
                f"config.json: {self._prefix}quantization_config.quant_method is {scheme!r}: the weights are "
                "quantized, which lading does not load. Use the checkpoint in its original precision."
            )

    def refuse_nested(self) -> None:
        """Refuse a key whose value is an object.

        :raises NotSupportedError: there is one.
        """
        for key, value in self._values.items():
            if isinstance(value, Mapping):
                self.refuse(key, value)

    def refuse(self, key: str, found: object, supported: Iterable[object] = ()) -> NoReturn:
        """Raise the error for a value that the family does not support.

        :raises NotSupportedError: always.
        """
        known = ", ".join(repr(value) for value in supported)
        raise NotSupportedError(
            f"config.json: {self._prefix}{key} is {found!r}, which the {self._family} family does not support"
            f"{f' (it supports {known})' if known else ''}. {_BY_ITS_OWN_CLASS}"
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

    def checked(self, config: ConfigT, check: Callable[[ConfigT], Any]) -> ConfigT:
        """Return ``config`` if ``check`` raises no ``ValueError``.

        :raises ModelCheckpointMismatchError: it does.
        """
        try:
            check(config)
        except ValueError as error:
            raise ModelCheckpointMismatchError(
                "config.json",
                f"config.json does not describe a model of the {self._family} family: {error}. Compare the file with "
                "the one that the model's publisher offers.",
            ) from None

        return config


def read_rope(reader: ConfigReader, scaling_type: str | None = None) -> tuple[float, ConfigReader | None]:
    """Return the base of the rotary frequencies, and the keys of their scaling if there is one.

    Understands ``rope_parameters`` and what came before transformers 5: ``rope_theta`` with ``rope_scaling``.

    :param scaling_type: the one that the family supports.

    :raises NotSupportedError: another type, parameters by kind of layer, or rotary embeddings of a part of each head.
    """
    section = reader.section("rope_scaling") or reader.section("rope_parameters")
    section.refuse_nested()
    for keys in (reader, section):
        keys.require("partial_rotary_factor", 1.0)

    theta = (section if "rope_theta" in section else reader).number("rope_theta", 10_000.0)

    return theta, _scaling(section, scaling_type)


def read_rope_of_layers(
    reader: ConfigReader, *, theta: float, window_theta: float, window_theta_key: str | None, scaling_type: str
) -> tuple[float, ConfigReader | None, float]:
    """Return the base of the rotary frequencies, the keys of their scaling, and the base in layers with a window.

    It reads ``rope_parameters`` by type of layer, and the keys before transformers 5: ``rope_theta`` and
    ``rope_scaling`` for layers without a window.

    :param theta: the default base of layers without a window.
    :param window_theta: the default base of layers with a window.
    :param window_theta_key: the key of the latter before transformers 5; ``None`` without such a key.
    :param scaling_type: the type of scaling that the family supports.

    :raises NotSupportedError: the scaling has another type, or applies to layers with a window or to a part of a head.
    """
    parameters = reader.section("rope_parameters")
    full, window = parameters.section("full_attention"), parameters.section("sliding_attention")
    if parameters and not full and not window:
        reader.refuse("rope_parameters", parameters.values())
    full = reader.section("rope_scaling") or full
    for keys in (reader, full, window):
        keys.require("partial_rotary_factor", 1.0)

    _scaling(window, None)
    if "rope_theta" in full:
        theta = full.number("rope_theta", None)
    else:
        theta = reader.number("rope_theta", theta)
    if "rope_theta" in window:
        window_theta = window.number("rope_theta", None)
    elif window_theta_key is not None:
        window_theta = reader.number(window_theta_key, window_theta)

    return theta, _scaling(full, scaling_type), window_theta


def _scaling(section: ConfigReader, scaling_type: str | None) -> ConfigReader | None:
    type_key = "type" if section.is_null("rope_type") else "rope_type"
    known = ("default",) if scaling_type is None else ("default", scaling_type)
    kind = "default" if section.is_null(type_key) else section.choice(type_key, "default", {k: k for k in known})

    return None if kind == "default" else section


def read_layer_types(reader: ConfigReader, num_layers: int, *, every: int) -> list[LayerType]:
    """Return the type of attention of each layer.

    :param every: one of so many has none where the file states no types.

    :raises NotSupportedError: other types.
    """
    types = reader.strings("layer_types")
    if types is None:
        return default_layer_types(num_layers, every=every)
    if set(types) - set(get_args(LayerType)):
        reader.refuse("layer_types", types)

    return cast(list[LayerType], types)


def default_layer_types(num_layers: int, *, every: int) -> list[LayerType]:
    """Return the types of layers with a window in all but the last of ``every``.

    :raises ValueError: there are more layers than modules can be made of.
    """
    require_layers(num_layers)

    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(num_layers)]


def full_attn_layers(types: Sequence[LayerType], num_layers: int) -> frozenset[int]:
    """Return the indices of the layers without a window.

    :raises ValueError: there is not one type for each layer.
    """
    if len(types) != num_layers:
        raise ValueError(f"`layer_types` must have one for each of the {num_layers} layers, but has {len(types)}")

    return frozenset(i for i, kind in enumerate(types) if kind == "full_attention")


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


SILU: Final = same_for_all("hidden_act", "silu", "swish")
"""The activation of most decoders."""

ROPE_KEYS: Final = ("rope_theta", "rope_scaling", "rope_parameters")

PLAIN_ROPE: Final = KeyGroup(
    ROPE_KEYS,
    lambda reader, earlier: {"rope_theta": read_rope(reader)[0]},
    lambda config: {"rope_theta": config.rope_theta},
)
"""Rotary frequencies that are not scaled, the same in all layers."""

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
    """The options of a model, a dataclass.

    :raises ValueError: no model is like that.
    """
    normalized_spec: Callable[[ConfigT], Any] | None = None
    """The switches, equal for configurations of equal models, where those of ``spec`` are not."""
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

    def honored(self) -> frozenset[str]:
        """Return the keys that are read."""
        return frozenset(key for entry in self.entries for key in entry.keys) | {"quantization_config"}

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

        return reader.checked(config, self.spec)

    def write(self, config: ConfigT) -> dict[str, object]:
        """Return the ``config.json`` that describes a model of the configuration.

        :raises NotSupportedError: no such file describes it.
        """
        values = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **self.constants,
            **keys_of(self.entries, config),
        }
        spec = self.normalized_spec or self.spec

        return describing(values, config, family=self.family, from_hf=self.read, spec=spec)


def describing(
    values: dict[str, object],
    config: ConfigT,
    *,
    family: str,
    from_hf: Callable[[Mapping[str, object]], ConfigT],
    spec: Callable[[ConfigT], Any],
    free: Collection[str] = (),
) -> dict[str, object]:
    """Return ``values`` if a ``config.json`` with them describes the same model as ``config``.

    Dropout may differ: it is a matter of training, for which these files have few words.

    :param spec: the switches of the model, a dataclass.
    :param free: further switches that may differ.

    :raises NotSupportedError: it does not, as Hugging Face's models of this type cannot be like that.
    """
    meant, read = spec(config), spec(from_hf(values))
    for name in (f.name for f in fields(meant) if f.name not in free and not f.name.endswith("drop_p")):
        if name.endswith("dropout_p") or getattr(meant, name) == getattr(read, name):
            continue
        raise NotSupportedError(
            f"A config.json of the type {values['model_type']!r} cannot describe this configuration of the {family} "
            f"family: `{name}` is {getattr(meant, name)!r}, but would be read as {getattr(read, name)!r}. Models like "
            "that have no form that transformers loads."
        )

    return values
