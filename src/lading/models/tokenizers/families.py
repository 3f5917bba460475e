"""The families of tokenizers, as fairseq2 0.8.1 has them: names, configurations and control tokens are its own.

They are one table beside the models, and not parts of the families of models: a tokenizer loads without a model, and
several families of models share one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lading.checkpoints.tokenizer_file import Library
from lading.errors import NotSupportedError, did_you_mean
from lading.models.tokenizers.tokenizer import ControlTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerLayout:
    """The parts of a tokenizer that a family and its configuration determine."""

    libraries: tuple[Library, ...]
    """The libraries whose files the family uses, the preferred one first."""
    control: ControlTokens = field(default_factory=ControlTokens)
    names: Mapping[str, str] = field(default_factory=dict)
    """The control tokens by their roles (``"bos"``, ``"eos"`` …); a model of sentencepiece states its own."""
    first: tuple[str, ...] = ()
    """The control tokens to put before the pieces of a model of sentencepiece."""
    last: tuple[str, ...] = ()
    """The control tokens to put behind them."""
    split_regex: str = ""
    """The expression that splits a text for tiktoken."""
    special_tokens: tuple[str, ...] = ()
    """The control tokens that tiktoken puts after the ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFamily:
    """A family of tokenizers: the class of its configuration, and the layout that follows from one."""

    name: str
    config_kls: type[Any]
    layout: Callable[[Any], TokenizerLayout]


# --- configurations ---------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class TokenizerConfig:
    """The configuration of the families that have nothing to configure."""


@dataclass(kw_only=True)
class LLaMATokenizerConfig:
    """The configuration of ``llama``."""

    impl: Literal["sp", "tiktoken", "hg"] = "sp"
    """The library: sentencepiece (LLaMA 1 and 2), tiktoken, or tokenizers."""
    use_eot: bool = False
    """End a text with ``<|eot_id|>`` instead of ``<|end_of_text|>``, as instruction-tuned models do."""
    split_regex: str | None = None
    """The expression that splits a text for tiktoken; default: that of LLaMA 3."""


@dataclass(kw_only=True)
class Llama4TokenizerConfig:
    """The configuration of ``llama4``."""

    use_eot: bool = True
    """End a text with ``<|eot|>`` instead of ``<|end_of_text|>``."""
    split_regex: str | None = None
    """The expression that splits a text; default: that of Llama 4."""


@dataclass(kw_only=True)
class QwenTokenizerConfig:
    """The configuration of ``qwen``."""

    use_im_end: bool = False
    """End a text with ``<|im_end|>`` instead of ``<|endoftext|>``, as instruction-tuned models do."""


@dataclass(kw_only=True)
class OLMOTokenizerConfig(QwenTokenizerConfig):
    """The configuration of ``olmo``."""


@dataclass(kw_only=True)
class NllbTokenizerConfig:
    """The configuration of ``nllb``."""

    langs: list[str] = field(default_factory=lambda: ["en"])
    """The languages, in the order of their control tokens."""
    default_lang: str = "en"


@dataclass(kw_only=True)
class S2TTransformerTokenizerConfig:
    """The configuration of ``s2t_transformer``."""

    task: Literal["translation", "transcription"] = "translation"
    target_langs: set[str] = field(default_factory=lambda: {"en"})
    default_target_lang: str = "en"


@dataclass(kw_only=True)
class HgTokenizerConfig:
    """The configuration of ``hg``: control tokens in place of those that ``tokenizer_config.json`` names."""

    unk_token: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    boh_token: str | None = None
    eoh_token: str | None = None


# --- layouts ----------------------------------------------------------------------------------------------------------


def _modes(begin: str | None, end: str | None) -> Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the modes of decoders; a generator continues a prompt, whose end therefore stays open."""
    prefix = () if begin is None else (begin,)
    suffix = () if end is None else (end,)

    return {"default": (prefix, suffix), "prompt": (prefix, ()), "prompt_response": ((), suffix)}


def _decoder_layout(
    library: Library,
    names: Mapping[str, str],
    *,
    begin: str | None = None,
    split_regex: str = "",
    special_tokens: tuple[str, ...] = (),
) -> TokenizerLayout:
    """Return the layout of a decoder whose texts go from ``begin``, if it has one, to ``names["eos"]``."""
    return TokenizerLayout(
        libraries=(library,),
        control=ControlTokens(modes={**_modes(begin, names["eos"]), "as_is": ((), ())}),
        names=names,
        split_regex=split_regex,
        special_tokens=special_tokens,
    )


def _any_layout(config: TokenizerConfig) -> TokenizerLayout:
    return TokenizerLayout(libraries=("tokenizers", "sentencepiece"), control=ControlTokens(ignore=True))


def _char_layout(config: TokenizerConfig) -> TokenizerLayout:
    return TokenizerLayout(libraries=("sentencepiece",))


def _mistral_layout(config: TokenizerConfig) -> TokenizerLayout:
    # Later models, such as Mistral Nemo, have only a tokenizer.json, with the same control tokens.
    return TokenizerLayout(
        libraries=("sentencepiece", "tokenizers"), control=ControlTokens(modes=_modes("<s>", "</s>"))
    )


def _llama_layout(config: LLaMATokenizerConfig) -> TokenizerLayout:
    if config.impl == "sp" and config.use_eot:
        raise NotSupportedError(
            "The configuration of a tokenizer of the family 'llama': expected `use_eot: false` with `impl: sp`, found "
            "true. Set `impl: hg` or `impl: tiktoken` in the card's `tokenizer_config`."
        )
    if config.impl != "tiktoken" and config.split_regex is not None:
        raise NotSupportedError(
            f"The configuration of a tokenizer of the family 'llama': expected no `split_regex` with `impl: "
            f"{config.impl}`, found one. Set `impl: tiktoken` in the card's `tokenizer_config`."
        )
    if config.impl == "sp":
        return TokenizerLayout(libraries=("sentencepiece",), control=ControlTokens(modes=_modes("<s>", "</s>")))

    eos = "<|eot_id|>" if config.use_eot else "<|end_of_text|>"

    return _decoder_layout(
        "tiktoken" if config.impl == "tiktoken" else "tokenizers",
        {
            "bos": "<|begin_of_text|>",
            "eos": eos,
            "pad": "<|finetune_right_pad_id|>",
            "boh": "<|start_header_id|>",
            "eoh": "<|end_header_id|>",
        },
        begin="<|begin_of_text|>",
        split_regex=_LLAMA3_REGEX if config.split_regex is None else config.split_regex,
        special_tokens=_LLAMA3_TOKENS,
    )


def _llama4_layout(config: Llama4TokenizerConfig) -> TokenizerLayout:
    eos = "<|eot|>" if config.use_eot else "<|end_of_text|>"

    return _decoder_layout(
        "tiktoken",
        {
            "bos": "<|begin_of_text|>",
            "eos": eos,
            "pad": "<|finetune_right_pad|>",
            "boh": "<|header_start|>",
            "eoh": "<|header_end|>",
        },
        begin="<|begin_of_text|>",
        split_regex=_LLAMA4_REGEX if config.split_regex is None else config.split_regex,
        special_tokens=_LLAMA4_TOKENS,
    )


def _qwen_layout(config: QwenTokenizerConfig) -> TokenizerLayout:
    return _decoder_layout("tokenizers", {"eos": _end(config), "pad": "<|endoftext|>"})


def _olmo_layout(config: OLMOTokenizerConfig) -> TokenizerLayout:
    names = {"unk": "<|endoftext|>", "bos": "<|endoftext|>", "eos": _end(config), "pad": "<|pad|>"}

    return _decoder_layout("tokenizers", names)


def _end(config: QwenTokenizerConfig) -> str:
    return "<|im_end|>" if config.use_im_end else "<|endoftext|>"


def _gemma_layout(config: TokenizerConfig) -> TokenizerLayout:
    begun = (("<bos>",), ())

    return TokenizerLayout(
        libraries=("tokenizers",),
        control=ControlTokens(modes={"default": begun, "prompt": begun, "as_is": ((), ())}),
        names={"unk": "<unk>", "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"},
    )


def _nllb_layout(config: NllbTokenizerConfig) -> TokenizerLayout:
    sources = {"source": (), "source_mining": ("<MINED_DATA>",), "source_mmt_bt": ("<MMT_BT_DATA>",),
               "source_smt_bt": ("<SMT_BT_DATA>",)}  # fmt: skip
    origins = ("<MINED_DATA>", "<MMT_BT_DATA>", "<SMT_BT_DATA>")

    return TokenizerLayout(
        libraries=("sentencepiece",),
        control=ControlTokens(
            modes={
                **{mode: (("__{lang}__", *origin), ("</s>",)) for mode, origin in sources.items()},
                "target": (("</s>", "__{lang}__"), ("</s>",)),
            },
            task="translation",
            langs=frozenset(config.langs),
            default_lang=config.default_lang,
        ),
        # The published model has neither padding nor languages, which the embeddings of NLLB have.
        first=("<pad>",),
        last=(*(f"__{lang}__" for lang in config.langs), *origins),
    )


def _s2t_transformer_layout(config: S2TTransformerTokenizerConfig) -> TokenizerLayout:
    states_lang = config.task == "translation" and len(config.target_langs) > 1

    return TokenizerLayout(
        libraries=("sentencepiece",),
        control=ControlTokens(
            modes={"target": (("</s>", "<lang:{lang}>") if states_lang else ("</s>",), ())},
            task=config.task,
            langs=frozenset(config.target_langs),
            default_lang=config.default_target_lang,
        ),
    )


def _hg_layout(config: HgTokenizerConfig) -> TokenizerLayout:
    names = {role: getattr(config, f"{role}_token") for role in ("unk", "bos", "eos", "pad", "boh", "eoh")}

    return TokenizerLayout(
        libraries=("tokenizers",),
        control=ControlTokens(ignore=True),
        names={role: token for role, token in names.items() if token},
    )


# --- control tokens of LLaMA 3 and Llama 4 ----------------------------------------------------------------------------

# Source: tokenizer.py of https://github.com/meta-llama/llama-models, models/llama3 and models/llama4.


def _filled(tokens: Sequence[str], size: int, begin: int) -> tuple[str, ...]:
    """Return ``size`` tokens: ``tokens``, and reserved ones with the numbers from ``begin`` on."""
    reserved = (f"<|reserved_special_token_{begin + i}|>" for i in range(size - len(tokens)))

    return (*tokens, *reserved)


def _numbered(name: str, begin: int, end: int) -> list[str]:
    return [f"<|{name}_reserved_special_token_{i}|>" for i in range(begin, end)]


_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|"
    r"\s+"
)

_LLAMA3_TOKENS = _filled(
    [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
        "<|eot_id|>", "<|python_tag|>",
    ],
    256,
    begin=2,
)  # fmt: skip

_LLAMA4_REGEX = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA4_TOKENS = _filled(
    [
        "<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
        "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>",
        *_numbered("text_post_train", 0, 8), "<|finetune_right_pad|>", *_numbered("text_post_train", 8, 69),
        "<|image_start|>", "<|image_end|>", *_numbered("vision", 0, 2),
        "<|tile_x_separator|>", "<|tile_y_separator|>", *_numbered("vision", 2, 6),
        "<|image|>", *_numbered("vision", 6, 7), "<|patch|>", *_numbered("vision", 7, 1048),
        *_numbered("reasoning", 0, 8), "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>",
    ],
    2048,
    begin=0,
)  # fmt: skip


# --- the table --------------------------------------------------------------------------------------------------------

ANY_FAMILY = TokenizerFamily(name="any", config_kls=TokenizerConfig, layout=_any_layout)
"""The family of a tokenizer for which neither a card nor the caller names one: nothing is put around a text."""

_FAMILIES = {
    family.name: family
    for family in (
        TokenizerFamily(name="char_tokenizer", config_kls=TokenizerConfig, layout=_char_layout),
        TokenizerFamily(name="gemma3n", config_kls=TokenizerConfig, layout=_gemma_layout),
        TokenizerFamily(name="hg", config_kls=HgTokenizerConfig, layout=_hg_layout),
        TokenizerFamily(name="llama", config_kls=LLaMATokenizerConfig, layout=_llama_layout),
        TokenizerFamily(name="llama4", config_kls=Llama4TokenizerConfig, layout=_llama4_layout),
        TokenizerFamily(name="mistral", config_kls=TokenizerConfig, layout=_mistral_layout),
        TokenizerFamily(name="nllb", config_kls=NllbTokenizerConfig, layout=_nllb_layout),
        TokenizerFamily(name="olmo", config_kls=OLMOTokenizerConfig, layout=_olmo_layout),
        TokenizerFamily(name="qwen", config_kls=QwenTokenizerConfig, layout=_qwen_layout),
        TokenizerFamily(
            name="s2t_transformer", config_kls=S2TTransformerTokenizerConfig, layout=_s2t_transformer_layout
        ),
    )
}


def get_tokenizer_family(name: str) -> TokenizerFamily:
    """Return the tokenizer family of a name.

    :raises NotSupportedError: lading has no such family.
    """
    try:
        return _FAMILIES[name]
    except KeyError:
        raise NotSupportedError(
            f"Expected a tokenizer family, one of {', '.join(_FAMILIES)}, found {name!r}."
            f"{did_you_mean(name, _FAMILIES)}"
        ) from None
