"""Tokenizers of all families through ``load_tokenizer``; their indices: tests/parity/test_fairseq2_tokenizers.py."""

from __future__ import annotations

import pickle
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lading import (
    AssetCard,
    AssetCardError,
    CorruptModelCheckpointError,
    NotSupportedError,
    Tokenizer,
    TorchNotFoundError,
    VocabularyInfo,
    create_fake_gangs,
    load_tokenizer,
)
from lading.models.tokenizers.families import LLaMATokenizerConfig, NllbTokenizerConfig, S2TTransformerTokenizerConfig

FILES = Path(__file__).parents[2] / "parity" / "fairseq2_tokenizers"
PIECES, RANKS, WORDS = FILES / "plain.model", FILES / "ranks.tiktoken", FILES / "tokenizer.json"

TIKTOKEN = LLaMATokenizerConfig(impl="tiktoken")
NLLB = NllbTokenizerConfig(langs=["eng", "fra"], default_lang="eng")

LOADS: dict[str, Callable[[], Tokenizer]] = {
    "pieces": lambda: load_tokenizer(PIECES, family="mistral"),
    "ranks": lambda: load_tokenizer(RANKS, family="llama", config=TIKTOKEN),
    "words": lambda: load_tokenizer(WORDS, family="gemma3n"),
}


@pytest.mark.parametrize("kind", LOADS)
def test_text_comes_back(kind: str) -> None:
    tokenizer = LOADS[kind]()
    text = "the ship's bill"
    indices = tokenizer.encode(text)
    assert (indices.dtype, indices.dim(), indices.device) == (torch.int64, 1, torch.device("cpu"))
    assert tokenizer.encode(text, device="meta").is_meta
    assert tokenizer.create_encoder(device=torch.device("meta")).prefix_indices.is_meta  # type: ignore[union-attr]

    begun = {tokenizer.vocab_info.bos_idx, tokenizer.vocab_info.eos_idx} & set(indices.tolist())
    assert begun
    raw = tokenizer.create_raw_encoder()
    assert raw.prefix_indices is None
    assert raw.suffix_indices is None
    for same in (
        raw(text),
        raw(text).int(),
        raw(text).tolist(),
        tuple(raw(text).tolist()),
        np.array(raw(text).tolist()),
        array("q", raw(text).tolist()),
    ):
        assert tokenizer.decode(same).strip() == text
    assert tokenizer.decode(indices, skip_special_tokens=True).strip() == text
    assert tokenizer.decode([]) == tokenizer.decode(torch.tensor([], dtype=torch.int64)) == ""

    again: Tokenizer = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(text).equal(indices)
    assert again.vocab_info == tokenizer.vocab_info


@pytest.mark.parametrize("kind", LOADS)
def test_indices_that_are_none(kind: str) -> None:
    decode = LOADS[kind]().create_decoder()
    for wrong in (torch.zeros(1, 2, dtype=torch.int64), torch.tensor(3), np.zeros((2, 2), dtype=int)):
        with pytest.raises(ValueError, match=r"one-dimensional, but is of the shape \("):
            decode(wrong)  # type: ignore[arg-type]
    for wrong in ([1.5], torch.tensor([1.5]), [[1]], ["1"]):
        with pytest.raises(TypeError):
            decode(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"indices of the vocabulary, but are -1 to 2"):
        decode([2, -1])
    if kind != "words":  # padded rows of an embedding; tokenizers skips them
        with pytest.raises(ValueError, match=r"indices of the vocabulary, but are 2 to 99999"):
            decode([2, 99_999])
        return
    assert decode([99_999]) == ""


def test_tokens_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"`tokens` must be tokens of the vocabulary.*nope"):
        LOADS["ranks"]().create_decoder().decode_from_tokens(["a", "nope"])
    with pytest.raises(ValueError, match=r"`tokens` must be tokens of the vocabulary.*nope"):
        load_tokenizer(WORDS).create_decoder().decode_from_tokens(["a", "nope"])


def test_a_tokenizer_without_a_family_puts_nothing_around_a_text() -> None:
    for path in (PIECES, WORDS):
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode("").tolist() == []
        assert tokenizer.create_encoder(mode="prompt")("ship").equal(tokenizer.create_raw_encoder()("ship"))
    with pytest.raises(NotSupportedError, match=r"found ranks of tiktoken.*`tokenizer_family`"):
        load_tokenizer(RANKS)


@pytest.mark.parametrize(
    ("family", "config", "arguments", "message"),
    [
        ("mistral", None, {"mode": "source"}, "expected 'default', 'prompt', 'prompt_response', found 'source'"),
        ("mistral", None, {"lang": "eng"}, r"lang=….*'mistral': expected None, as it has none, found 'eng'"),
        ("mistral", None, {"task": "translation"}, "expected None, as it has none, found 'translation'"),
        ("char_tokenizer", None, {"mode": "default"}, "expected None, as it has none, found 'default'"),
        ("nllb", NLLB, {"lang": "deu"}, "expected 'eng', 'fra', found 'deu'"),
        ("nllb", NLLB, {"task": "transcription"}, "expected 'translation', found 'transcription'"),
        ("nllb", NLLB, {"mode": "prompt"}, "expected 'source'.*'target', found 'prompt'"),
        ("nllb", NllbTokenizerConfig(langs=["fra"]), {}, "expected 'fra', found 'en'"),
        ("nllb", NllbTokenizerConfig(langs=[f"l{i}" for i in range(20)]), {}, "and 12 more, found 'en'"),
        ("s2t_transformer", S2TTransformerTokenizerConfig(target_langs={"de", "fr"}, default_target_lang="de"), {},
         "expected the control token '<lang:de>'.*`create_raw_encoder"),
    ],
)  # fmt: skip
def test_what_a_family_lacks(family: str, config: Any, arguments: dict[str, str], message: str) -> None:
    tokenizer = load_tokenizer(PIECES, family=family, config=config)
    with pytest.raises(NotSupportedError, match=message):
        tokenizer.create_encoder(**arguments)  # type: ignore[arg-type]


def test_a_vocabulary_without_the_control_tokens_of_its_family(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
    )
    tokenizer = load_tokenizer(tmp_path, family="qwen")
    assert tokenizer.vocab_info == VocabularyInfo(1, None, None, None, None)
    assert tokenizer.create_encoder(mode="as_is")("a").tolist() == [0]
    with pytest.raises(NotSupportedError, match=r"expected the control token '<\|endoftext\|>'.*'qwen'"):
        tokenizer.encode("a")


def test_files_of_another_library() -> None:
    for path, family, found in (
        (WORDS, "llama", "tokenizer.json"),
        (RANKS, "nllb", "ranks of tiktoken"),
        (PIECES, "qwen", "a model"),
    ):
        with pytest.raises(NotSupportedError, match=f"found {found}.*`tokenizer_family`"):
            load_tokenizer(path, family=family)
    # Some repositories of Mistral have only a tokenizer.json.
    assert load_tokenizer(WORDS, family="mistral").create_encoder(mode="prompt").encode_as_tokens("") == ["<s>"]


def test_arguments_that_are_wrong() -> None:
    with pytest.raises(NotSupportedError, match=r"found 'lama'. Did you mean 'llama'"):
        load_tokenizer(PIECES, family="lama")
    with pytest.raises(
        TypeError, match=r"must be a LLaMATokenizerConfig for the tokenizer family 'llama'.*NllbTokenizer"
    ):
        load_tokenizer(PIECES, family="llama", config=NLLB)
    for config in (LLaMATokenizerConfig(use_eot=True), LLaMATokenizerConfig(split_regex=".")):
        with pytest.raises(NotSupportedError, match=r"family 'llama': expected .*`tokenizer_config`"):
            load_tokenizer(PIECES, family="llama", config=config)


def card(**fields: object) -> AssetCard:
    return AssetCard("words", {"tokenizer": WORDS.as_uri(), **fields})


def test_what_a_card_says(home: Path) -> None:
    base = card(tokenizer_family="qwen", tokenizer_config={"use_im_end": True})
    assert load_tokenizer(base).decode(load_tokenizer(base).encode("")) == "<|im_end|>"
    child = AssetCard("child", {"tokenizer_config": {"use_im_end": False}}, base)
    assert load_tokenizer(child).decode(load_tokenizer(child).encode("")) == "<|endoftext|>"
    # Another family takes nothing from a configuration that is not its own.
    assert load_tokenizer(base, family="hg").encode("").tolist() == []
    # An older name of the field wins, as in fairseq2.
    older = AssetCard("older", {"tokenizer_config_overrides": {"use_im_end": False}}, base)
    assert load_tokenizer(older).decode(load_tokenizer(older).encode("")) == "<|endoftext|>"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer_family": "qwem"}, "'tokenizer_family' of the card 'words'.*found 'qwem'. Did you mean 'qwen'"),
        ({"tokenizer_family": "qwen", "tokenizer_config": {"use_im_and": True}}, "card 'words'.*use_im_end"),
        ({"tokenizer_family": "qwen", "tokenizer_config": {"use_im_end": 3}}, "expected true or false, found 3"),
        ({"tokenizer_family": "llama", "tokenizer_config": {"impl": "spm"}}, "'sp'.*found 'spm'"),
        ({"tokenizer_family": "nllb", "tokenizer_config": {"langs": "eng"}}, "expected a list"),
        ({"tokenizer_family": "gemma3n", "tokenizer_config": {"use_eot": True}}, "unknown key"),
    ],
)  # fmt: skip
def test_what_a_card_says_wrong(home: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(AssetCardError, match=message):
        load_tokenizer(card(**fields))


@pytest.mark.parametrize(
    ("kind", "package"), [("pieces", "sentencepiece"), ("ranks", "tiktoken"), ("words", "tokenizers")]
)
def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, kind: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        NotSupportedError, match=rf"package {package}, which is not installed: `pip install 'lading-hub\[tokenizers\]'"
    ):
        LOADS[kind]()


def test_without_torch_the_native_model_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = LOADS["pieces"]()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert tokenizer.decode(tokenizer.model.encode("ship")) == "ship"
    assert tokenizer.create_encoder().encode_as_tokens("")[0] == "<s>"
    with pytest.raises(TorchNotFoundError, match="Encoding a text needs torch"):
        tokenizer.encode("ship")


@pytest.mark.parametrize(
    "data",
    [
        b"IQ== 0\nIg== 0\n", b"IQ== 0\nIg== 2\n", b"IQ== 0\nIg==\n", b"IQ== 0\n! 1\n", b"IQ== 0\nIg== x\n",
        b"IQ== 0\nIQ== 1\n", b"IQ== 0\nIg== -1\n",
    ],
)  # fmt: skip
def test_ranks_that_are_damaged(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CorruptModelCheckpointError, match=r"tokenizer\.model: .*expected .*, found "):
        load_tokenizer(tmp_path, family="llama", config=TIKTOKEN)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"added_tokens_decoder": [1]}',
        '{"added_tokens_decoder": {"x": {}}}',
        '{"added_tokens_decoder": {"1": 1}}',
    ],
)
def test_files_beside_that_are_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(WORDS.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(CorruptModelCheckpointError, match=r"tokenizer_config.json"):
        load_tokenizer(tmp_path)


def test_control_tokens_of_older_repositories(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(WORDS.read_bytes())
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    info = load_tokenizer(tmp_path).vocab_info
    assert (info.bos_idx, info.eos_idx) == (1, 2)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>", "eos_token": 3}')
    assert load_tokenizer(tmp_path).vocab_info.bos_idx == 330


def test_padding_is_none_where_it_ends_a_sequence() -> None:
    assert VocabularyInfo(9, 0, 1, 2, 2).pad_idx is None
    assert VocabularyInfo(9, 0, 1, 2, 3).pad_idx == 3


def test_a_gang_of_one() -> None:
    gangs = create_fake_gangs(device="cpu")
    assert load_tokenizer(PIECES, gangs=gangs).encode("ship").equal(load_tokenizer(PIECES).encode("ship"))
