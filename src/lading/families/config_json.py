"""What the families share to read Hugging Face checkpoints: the keys of ``config.json`` and the names of tensors.

The meaning of the keys, and what holds where one is absent, is that of the configuration classes of transformers.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, NoReturn, TypeVar, cast, get_args

from lading.errors import InternalError, ModelCheckpointMismatchError, NotSupportedError
from lading.families.nn.checks import MAX_LAYERS, MAX_SIZE, require_layers
from lading.planning.rules import Rule

log = logging.getLogger("lading")

ConfigT = TypeVar("ConfigT")

_BY_ITS_OWN_CLASS = (
    "`get_hg_model_hub().load_model(…)` loads it by its own class of transformers; in a card: `model_family: hg`."
)

LayerType = Literal["sliding_attention", "full_attention"]
"""Whether the attention of a layer has a window."""

HEAD = re.compile(r"(lm_head|score|classifier|qa_outputs|v_head|value_head|regression_head)\..*")
"""Names of what stands behind the last layer."""


def explain_head(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """Return what to do about a checkpoint of a decoder that has another head than that of a language model, or none.

    :param missing: names of parameters that it lacks.
    :param unexpected: names of tensors that no rule knows.
    """
    if not (missing or unexpected) or not all(HEAD.fullmatch(name) for name in (*missing, *unexpected)):
        return None
    what = "has another head than a language model" if unexpected else "has no head"

    return f"The checkpoint {what}: see `architectures` in its config.json. {_BY_ITS_OWN_CLASS}"


DECODER_RULES: Final[Sequence[Rule]] = (
    # Old versions of transformers saved these buffers, which are computed.
    Rule("{prefix*}rotary_emb.inv_freq", None),
    Rule("rotary_emb.inv_freq", None),
    # Heads that draft further tokens, which transformers passes over, too.
    Rule("mtp.{rest*}", None),
    Rule("model.mtp.{rest*}", None),
    # A checkpoint of the model without its head lacks the prefix.
    Rule("embed_tokens.weight", "model.embed_tokens.weight"),
    Rule("layers.{n}.{rest*}", "model.layers.{n}.{rest}"),
    Rule("norm.weight", "model.norm.weight"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTable:
    """The treatment by a family of the keys of a ``config.json``: for each key one of these."""

    honored: frozenset[str]
    """Keys that the family reads."""
    required: Mapping[str, object]
    """Keys that change what transformers computes, with the only value that the family supports; it is also what holds
    where the key is absent."""
    ignored: Mapping[str, str]
    """Keys that do not change what a model computes, and why."""

    def unknown(self, values: Mapping[str, object]) -> list[str]:
        """Return the keys of ``values`` that the family does not know and that are set to something."""
        known = self.honored | self.required.keys() | self.ignored.keys() | IGNORED_KEYS.keys()

        return sorted(key for key, value in values.items() if key not in known and value)


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
"""Keys that no family reads, and why."""

_CHANGES_EACH_MODEL: Final[Mapping[str, object]] = {"per_layer_config": None, "attribute_map": None}

_CHANGES_EACH_DECODER: Final[Mapping[str, object]] = {
    **_CHANGES_EACH_MODEL,
    "is_causal": True,
    "partial_rotary_factor": 1.0,
    "attention_chunk_size": None,
    "_rope_type_labels": None,
}

NO_WINDOWS: Final[Mapping[str, object]] = {"layer_types": None, "sliding_window": None}
"""Keys by which transformers shortens its cache in generation, whether or not layers of the type have a window."""

NO_SCALING: Final[Mapping[str, str]] = {"original_max_position_embeddings": "it is of a scaling, and none is supported"}
"""Keys that a family without scaled rotary frequencies ignores."""

_DECODER_KEYS: Final = frozenset(
    """
    hidden_size max_position_embeddings vocab_size pad_token_id tie_word_embeddings num_hidden_layers
    num_attention_heads num_key_value_heads intermediate_size rms_norm_eps rope_theta rope_scaling rope_parameters
    quantization_config
    """.split()
)


def decoder_keys(
    honored: str = "", *, required: Mapping[str, object] | None = None, ignored: Mapping[str, str] | None = None
) -> KeyTable:
    """Return the keys of a decoder.

    :param honored: names of keys that it reads, besides those that all decoders here read.
    :param required: further keys, with the only value that it supports.
    :param ignored: further keys that change nothing, and why.
    """
    return KeyTable(
        honored=_DECODER_KEYS | set(honored.split()),
        required={**_CHANGES_EACH_DECODER, **(required or {})},
        ignored=ignored or {},
    )


def encoder_keys(honored: str, *, required: Mapping[str, object], ignored: Mapping[str, str]) -> KeyTable:
    """Return the keys of an encoder; parameters as those of :func:`decoder_keys`."""
    return KeyTable(honored=frozenset(honored.split()), required={**_CHANGES_EACH_MODEL, **required}, ignored=ignored)


class ConfigReader:
    """The keys of a ``config.json``, each checked where it is read.

    :param family: the family that reads, for messages.
    :param table: what the family does with each key; ``None`` where only some are read.

    :raises NotSupportedError: a key of ``table.required`` has another value.
    :raises ModelCheckpointMismatchError: (all methods that read a key) its value is of another type.
    """

    def __init__(
        self, values: Mapping[str, object], family: str, prefix: str = "", table: KeyTable | None = None
    ) -> None:
        self._values = values
        self._family = family
        self._prefix = prefix
        self._table = table

        if table is None:
            return
        for key, value in table.required.items():
            self.require(key, value)
        if unknown := table.unknown(values):
            log.warning(
                "config.json: the %s family does not know %s, and loads as if it were not there.",
                family,
                ", ".join(f"{prefix}{key}" for key in unknown),
            )

    def _get(self, key: str, default: object = None) -> object:
        table = self._table
        if table is not None and key not in table.honored and key not in table.required:
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
        """Whether the key is absent or null."""
        return self._get(key) is None

    def count(self, key: str, default: int) -> int:
        """A positive integer."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.mismatch(key, "a positive integer")
        if value > MAX_SIZE:
            self.mismatch(key, f"a positive integer, at most {MAX_SIZE}")

        return value

    def layers(self, key: str, default: int) -> int:
        """A number of layers, of which modules can be made."""
        if (value := self.count(key, default)) > MAX_LAYERS:
            self.mismatch(key, f"a number of layers, at most {MAX_LAYERS}")

        return value

    def maybe_count(self, key: str, default: int | None) -> int | None:
        """A positive integer, or null."""
        return None if self._get(key, default) is None else self.count(key, default or 0)

    def index(self, key: str, default: int | None) -> int | None:
        """An integer, or null; a negative one means the same as null."""
        value = self._get(key, default)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            self.mismatch(key, "an integer or null")

        return value if value >= 0 else None

    def number(self, key: str, default: float | None) -> float:
        """A finite number that is not negative; required where ``default`` is ``None``."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
            self.mismatch(key, "a finite number that is not negative")

        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.mismatch(key, "true or false")

        return value

    def choice(self, key: str, default: str, choices: Mapping[str, str]) -> str:
        """What ``choices`` says for a value.

        :raises NotSupportedError: it says nothing.
        """
        value = self._get(key, default)
        if not isinstance(value, str):
            self.mismatch(key, "a string")
        if value not in choices:
            self.refuse(key, value, choices)

        return choices[value]

    def counts(self, key: str, default: Sequence[int]) -> list[int]:
        """A list of positive integers."""
        value = self._get(key, list(default))
        if not isinstance(value, list) or not all(
            isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value
        ):
            self.mismatch(key, "a list of positive integers")
        if max(value, default=0) > MAX_SIZE:
            self.mismatch(key, f"a list of positive integers, each at most {MAX_SIZE}")

        return value

    def strings(self, key: str) -> list[str] | None:
        """A list of strings, or null."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            self.mismatch(key, "a list of strings")

        return value

    def section(self, key: str, table: KeyTable | None = None) -> ConfigReader:
        """The keys of an object; of none where it is absent or null."""
        value = self._get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            self.mismatch(key, "an object")

        return ConfigReader(value, self._family, f"{self._prefix}{key}.", table)

    def require(self, key: str, value: object) -> None:
        """Refuse all but ``value``, which is also what holds where the key is absent.

        So does null, but not for what is true by default: transformers takes null for false.

        :raises NotSupportedError: the file says something else.
        """
        found = self._get(key, value)
        if found != value and (found is not None or value is True):
            self.refuse(key, found, () if value is None else (value,))

    def refuse_quantised(self) -> None:
        """Refuse weights that are stored in a quantised form.

        :raises NotSupportedError: the file says that they are.
        """
        if not self.is_null("quantization_config"):
            scheme = self.section("quantization_config")._get("quant_method")
            raise NotSupportedError(
                f"config.json: {self._prefix}quantization_config.quant_method is {scheme!r}: the weights are "
                "quantised, which lading does not load. Use the checkpoint in its original precision."
            )

    def refuse_nested(self) -> None:
        """Refuse a key whose value is an object.

        :raises NotSupportedError: there is one.
        """
        for key, value in self._values.items():
            if isinstance(value, Mapping):
                self.refuse(key, value)

    def refuse(self, key: str, found: object, supported: Iterable[object] = ()) -> NoReturn:
        """Say that the family does not do what the file asks for.

        :raises NotSupportedError: always.
        """
        known = ", ".join(repr(value) for value in supported)
        raise NotSupportedError(
            f"config.json: {self._prefix}{key} is {found!r}, which the {self._family} family does not support"
            f"{f' (it supports {known})' if known else ''}. {_BY_ITS_OWN_CLASS}"
        )

    def mismatch(self, key: str, expected: str) -> NoReturn:
        """Say that the value of a key is not what is expected.

        :raises ModelCheckpointMismatchError: always.
        """
        what = f"is {self._values[key]!r}" if key in self._values else "is missing"
        raise ModelCheckpointMismatchError(
            "config.json",
            f"config.json: {self._prefix}{key} is expected to be {expected}, but {what}. Compare the file with the one "
            "that the model's publisher offers.",
        )

    def checked(self, config: ConfigT, check: Callable[[ConfigT], Any]) -> ConfigT:
        """``config``, if ``check`` raises no ``ValueError``.

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


def read_decoder_config(values: Mapping[str, object], family: str, table: KeyTable) -> ConfigReader:
    """Return a reader, after refusing what the family does not honor.

    Dropout is not read: it is a matter of training, and published files say zero.

    :raises NotSupportedError: quantised weights, another activation, or a key with a value that the family does not
        support, such as attention that isn't causal.
    """
    reader = ConfigReader(values, family, table=table)
    reader.refuse_quantised()
    reader.choice("hidden_act", "silu", {"silu": "silu", "swish": "silu"})

    return reader


def read_rope(reader: ConfigReader, scaling_type: str | None = None) -> tuple[float, ConfigReader | None]:
    """The base of the rotary frequencies, and the keys of their scaling if there is one.

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
    """The base of the rotary frequencies, the keys of their scaling if there is one, and the base in layers with a
    window, where they are not scaled.

    Understands ``rope_parameters`` by kind of layer, and what came before transformers 5: ``rope_theta`` and
    ``rope_scaling`` for layers without a window.

    :param theta: that of layers without a window where the file states none.
    :param window_theta: that of layers with a window where the file states none.
    :param window_theta_key: the key of the latter before transformers 5; ``None`` where there was none.
    :param scaling_type: the one that the family supports.

    :raises NotSupportedError: another type, scaling in layers with a window, or of a part of each head.
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
    """Of each layer, whether its attention has a window.

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
    """A window in all layers but one of ``every``, the last of them.

    :raises ValueError: there are more layers than modules can be made of.
    """
    require_layers(num_layers)

    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(num_layers)]


def full_attn_layers(types: Sequence[LayerType], num_layers: int) -> frozenset[int]:
    """The indices of the layers without a window.

    :raises ValueError: there is not one type for each layer.
    """
    if len(types) != num_layers:
        raise ValueError(f"`layer_types` must have one for each of the {num_layers} layers, but has {len(types)}")

    return frozenset(i for i, kind in enumerate(types) if kind == "full_attention")


# --- the way back ----------------------------------------------------------------------------------------------------


def describing(
    values: dict[str, object],
    config: ConfigT,
    *,
    family: str,
    from_hf: Callable[[Mapping[str, object]], ConfigT],
    spec: Callable[[ConfigT], Any],
    free: Collection[str] = (),
) -> dict[str, object]:
    """``values``, if a ``config.json`` of them describes just the model that ``config`` does.

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


def decoder_values(model_type: str, architecture: str, config: Any, **values: object) -> dict[str, object]:
    """The keys of ``config.json`` that the decoders share.

    :param architecture: the class of transformers.
    :param config: of a family whose fields bear the names of fairseq2's.
    :param values: what is different or more.
    """
    shared: dict[str, object] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": config.model_dim,
        "max_position_embeddings": config.max_seq_len,
        "vocab_size": config.vocab_size,
        # Which symbols begin and end a text is the tokenizer's to say.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": config.tied_embeddings,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attn_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.ffn_inner_dim,
        "rope_theta": config.rope_theta,
    }

    if getattr(config, "head_dim", None) is not None:
        shared["head_dim"] = config.head_dim

    return shared | values
