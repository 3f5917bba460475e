"""Print as JSON what fairseq2's tokenizers make of a few texts, by the tiny files of ``make_tokenizers.py``.

Run it where fairseq2 0.8.1 is installed::

    python tests/parity/dump_fairseq2_tokenizers.py > tests/parity/fairseq2_tokenizers.json
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from fairseq2.data.tokenizers.char import load_char_tokenizer
from fairseq2.models.gemma3n.tokenizer import load_gemma3n_tokenizer
from fairseq2.models.hg.tokenizer import HgTokenizerConfig, load_hg_tokenizer
from fairseq2.models.llama.tokenizer import LLaMATokenizerConfig, load_llama_tokenizer
from fairseq2.models.llama4.tokenizer import Llama4TokenizerConfig, load_llama4_tokenizer
from fairseq2.models.mistral.tokenizer import load_mistral_tokenizer
from fairseq2.models.nllb.tokenizer import NllbTokenizerConfig, load_nllb_tokenizer
from fairseq2.models.olmo.tokenizer import OLMOTokenizerConfig, load_olmo_tokenizer
from fairseq2.models.qwen.tokenizer import QwenTokenizerConfig, load_qwen_tokenizer
from fairseq2.models.s2t_transformer.tokenizer import S2TTransformerTokenizerConfig, load_s2t_transformer_tokenizer

FILES = Path(__file__).with_name("fairseq2_tokenizers")

TEXTS = (
    "the ship carries coal", "", " ", "  two  spaces ", "It's the ship's grain , isn't it ?", "tabs\tand\nlines\r\n\n",
    "über die Nordsee", "корабль везёт уголь", "船は石炭を運ぶ", "🚢 ☃ é", "12345678 x 3.14", "<s> </s> <unk> <pad>",
    "<|im_start|>user<|im_end|> <think>", "<bos> <|eot_id|><|begin_of_text|>", "__eng__ <lang:de>", "bill\0of lading",
)  # fmt: skip

NAMED = {
    "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}, "unk_token": "<unk>",
    "pad_token": "</s>",
}  # fmt: skip

HG: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
"""The least of a tokenizer_config.json."""

MORE: dict[str, Any] = HG | NAMED | {
    "clean_up_tokenization_spaces": True, "add_prefix_space": True, "additional_special_tokens": ["<extra>"],
    "mask_token": "<mask>",
    "added_tokens_decoder": {
        "3000": {"content": "ship's", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                 "special": False},
        "346": {"content": "<think>", "lstrip": True, "normalized": True, "rstrip": True, "single_word": False,
                "special": False},
    },
}  # fmt: skip

LLAMA3 = {"impl": "tiktoken"}
LANGS = {"langs": ["eng", "deu_Latn", "fra"], "default_lang": "deu_Latn"}

CASES: tuple[tuple[str, str, dict[str, Any], dict[str, Any] | None, tuple[dict[str, str], ...]], ...] = (
    ("char_tokenizer", "plain.model", {}, None, ({},)),
    ("mistral", "plain.model", {}, None, ({}, {"mode": "default"}, {"mode": "prompt"}, {"mode": "prompt_response"})),
    ("llama", "plain.model", {}, None, ({}, {"mode": "prompt"}, {"mode": "prompt_response"})),
    ("llama", "ranks.tiktoken", LLAMA3, None, ({}, {"mode": "prompt"}, {"mode": "prompt_response"}, {"mode": "as_is"})),
    ("llama", "ranks.tiktoken", LLAMA3 | {"use_eot": True, "split_regex": r"\s+|\S+"}, None, ({}, {"mode": "prompt"})),
    ("llama", "tokenizer.json", {"impl": "hg"}, HG, ({}, {"mode": "prompt_response"}, {"mode": "as_is"})),
    ("llama", "tokenizer.json", {"impl": "hg", "use_eot": True}, MORE, ({}, {"mode": "prompt"})),
    ("llama4", "ranks.tiktoken", {}, None, ({}, {"mode": "prompt"}, {"mode": "as_is"})),
    ("llama4", "ranks.tiktoken", {"use_eot": False}, None, ({},)),
    ("qwen", "tokenizer.json", {}, HG, ({}, {"mode": "prompt"}, {"mode": "prompt_response"}, {"mode": "as_is"})),
    ("qwen", "tokenizer.json", {"use_im_end": True}, MORE, ({},)),
    ("olmo", "tokenizer.json", {}, HG, ({}, {"mode": "prompt"}, {"mode": "prompt_response"}, {"mode": "as_is"})),
    ("olmo", "tokenizer.json", {"use_im_end": True}, MORE, ({},)),
    ("gemma3n", "tokenizer.json", {}, MORE, ({}, {"mode": "default"}, {"mode": "prompt"}, {"mode": "as_is"})),
    ("hg", "tokenizer.json", {}, HG, ({}, {"mode": "any", "task": "any", "lang": "any"})),
    ("hg", "tokenizer.json", {}, MORE, ({},)),
    ("hg", "tokenizer.json", {}, HG | {"add_prefix_space": None}, ({},)),
    ("qwen", "tokenizer.json", {}, NAMED | {"tokenizer_class": "Qwen2Tokenizer"}, ({},)),
    ("hg", "tokenizer.json", {"eos_token": "<eos>", "boh_token": "<|im_start|>", "pad_token": "<pad>"}, MORE, ({},)),
    ("nllb", "plain.model", LANGS, None, (
        {}, {"task": "translation", "lang": "eng"}, {"lang": "fra", "mode": "source_mining"}, {"mode": "source_mmt_bt"},
        {"mode": "source_smt_bt"}, {"mode": "target", "lang": "eng"},
    )),
    ("s2t_transformer", "speech.model", {"task": "transcription"}, None, ({}, {"mode": "target"})),
    ("s2t_transformer", "speech.model", {"target_langs": ["de"], "default_target_lang": "de"}, None, ({},)),
    ("s2t_transformer", "speech.model", {"target_langs": ["de", "fr"], "default_target_lang": "de"}, None, (
        {}, {"task": "translation", "lang": "fr"},
    )),
)  # fmt: skip
"""Each a family, a file, the family's configuration, the tokenizer_config.json, and arguments of encoders."""

LOADERS: dict[str, tuple[Callable[[Path, Any], Any], Callable[..., Any]]] = {
    "char_tokenizer": (load_char_tokenizer, lambda: None),
    "gemma3n": (load_gemma3n_tokenizer, lambda: None),
    "hg": (load_hg_tokenizer, HgTokenizerConfig),
    "llama": (load_llama_tokenizer, LLaMATokenizerConfig),
    "llama4": (load_llama4_tokenizer, Llama4TokenizerConfig),
    "mistral": (load_mistral_tokenizer, lambda: None),
    "nllb": (load_nllb_tokenizer, NllbTokenizerConfig),
    "olmo": (load_olmo_tokenizer, OLMOTokenizerConfig),
    "qwen": (load_qwen_tokenizer, QwenTokenizerConfig),
    "s2t_transformer": (load_s2t_transformer_tokenizer, S2TTransformerTokenizerConfig),
}


def dumped(family: str, path: Path, config: dict[str, Any], encoders: tuple[dict[str, str], ...]) -> dict[str, Any]:
    load, config_kls = LOADERS[family]
    tokenizer = load(path, config_kls(**config))
    info = tokenizer.vocab_info
    decode = tokenizer.create_decoder()
    # The decoder of `hg` is the first that it made, so this one comes from another tokenizer.
    skip = load(path, config_kls(**config)).create_decoder(skip_special_tokens=True)
    raw = tokenizer.create_raw_encoder()

    def encoded(arguments: dict[str, str]) -> dict[str, Any]:
        encode = tokenizer.create_encoder(**arguments)
        prefix, suffix = encode.prefix_indices, encode.suffix_indices
        indices = [encode(text) for text in TEXTS]
        return {
            "arguments": arguments,
            "prefix": None if prefix is None else prefix.tolist(),
            "suffix": None if suffix is None else suffix.tolist(),
            "indices": [each.tolist() for each in indices],
            "tokens": encode.encode_as_tokens(TEXTS[0]),
        }

    indices = [tokenizer.create_encoder(**encoders[0])(text) for text in TEXTS]
    assert all(each.dtype == torch.int64 for each in indices)

    return {
        "vocab_info": {key: getattr(info, key) for key in (
            "size", "unk_idx", "bos_idx", "eos_idx", "pad_idx", "boh_idx", "eoh_idx",
        )},
        "raw": [raw(text).tolist() for text in TEXTS],
        "decoded": [decode(each) for each in indices],
        "skipped": [skip(each) for each in indices],
        "from_tokens": decode.decode_from_tokens(raw.encode_as_tokens(TEXTS[0])),
        "encoders": [encoded(arguments) for arguments in encoders],
    }  # fmt: skip


def main() -> None:
    cases = []
    for family, name, config, tokenizer_config, encoders in CASES:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(shutil.copy(FILES / name, temporary))
            if tokenizer_config is not None:
                path.with_name("tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
                path = path.parent
            cases.append(
                {"family": family, "file": name, "config": config, "tokenizer_config": tokenizer_config}
                | dumped(family, path, config, encoders)
            )

    json.dump({"fairseq2": version("fairseq2"), "texts": TEXTS, "cases": cases}, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
