"""Where a card's tokenizer is, and what reads it; on this machine. From a hub: tests/e2e/test_pull.py."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers

from lading import (
    AssetCard,
    AssetCardError,
    AssetStore,
    CorruptModelCheckpointError,
    NotSupportedError,
    get_asset_store,
    import_cards,
    load_tokenizer,
)
from lading.cards.card import CheckpointRef
from lading.checkpoints.extra_files import TokenizerRef, same_source, tokenizer_ref
from lading.errors import CheckpointNotFoundError, ModelGatedError


@pytest.fixture(scope="module")
def files() -> Mapping[str, bytes]:
    """A tokenizer of each kind."""
    words = Tokenizer(models.WordLevel({"a": 0, "bill": 1, "of": 2, "lading": 3, "?": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a bill of lading", "a gang of four", "bills and gangs"] * 20),
        model_writer=model, vocab_size=30, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return {"tokenizer.json": words.to_str().encode(), "tokenizer.model": model.getvalue()}


def put(folder: Path, files: Mapping[str, bytes], *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(files[name])
    return folder


def test_a_folder_and_a_file(tmp_path: Path, files: Mapping[str, bytes]) -> None:
    both = put(tmp_path / "both", files, *files)
    for path in (both, both / "tokenizer.json"):
        words = load_tokenizer(path).model
        assert isinstance(words, Tokenizer)
        assert words.encode("a bill of lading").ids == [0, 1, 2, 3]

    for path in (put(tmp_path / "pieces", files, "tokenizer.model"), both / "tokenizer.model"):
        pieces = load_tokenizer(path).model
        assert isinstance(pieces, sentencepiece.SentencePieceProcessor)
        assert pieces.decode(pieces.encode("a bill of lading")) == "a bill of lading"


@pytest.fixture
def store(home: Path, tmp_path: Path, files: Mapping[str, bytes]) -> AssetStore:
    put(tmp_path / "model", files, "tokenizer.json")
    (tmp_path / "model" / "model.safetensors").touch()
    put(tmp_path / "other", files, "tokenizer.model")
    with tarfile.open(tmp_path / "both.tar", "w") as archive:
        archive.add(tmp_path / "other" / "tokenizer.model", "inner/tokenizer.model")
    with ZipFile(tmp_path / "both.zip", "w", ZIP_DEFLATED) as zipped:
        zipped.write(tmp_path / "other" / "tokenizer.model", "inner/tokenizer.model")
    cards = """
name: beside
checkpoint: model
---
name: beside_a_file
checkpoint: model/model.safetensors
---
name: stated
checkpoint: model
tokenizer: other
---
name: child
base: stated
---
name: child_of_another_mind
base: stated
tokenizer_ref: beside_by_name
---
name: beside_by_name
tokenizer: model/tokenizer.json
---
name: far
tokenizer_ref: child_of_another_mind
---
name: inner
tokenizer: other
tokenizer_path: tokenizer.model
---
name: archived
tokenizer: both.tar
tokenizer_path: inner/tokenizer.model
---
name: zipped
tokenizer: both.zip
tokenizer_path: inner/tokenizer.model
---
name: zipped_elsewhere
tokenizer: both.zip
tokenizer_path: elsewhere/tokenizer.model
---
name: circle
tokenizer_ref: circle_back
---
name: circle_back
tokenizer_ref: circle
---
name: none
base: stated
tokenizer: null
---
name: gone
tokenizer: nowhere
---
name: gated
url: https://example.com/ask
---
name: web
checkpoint: https://example.com/model.safetensors
"""
    (tmp_path / "cards.yaml").write_text(cards)
    import_cards(tmp_path / "cards.yaml")
    return get_asset_store()


WORDS = ("beside", "beside_a_file", "child_of_another_mind", "far", "none")
PIECES = ("stated", "child", "inner", "archived", "zipped")


@pytest.mark.few(3)
@pytest.mark.parametrize("name", WORDS + PIECES)
def test_where_a_card_says(store: AssetStore, name: str) -> None:
    assert isinstance(load_tokenizer(name).model, Tokenizer if name in WORDS else sentencepiece.SentencePieceProcessor)
    assert load_tokenizer(store.retrieve_card(name), store=store) is not None


def test_what_a_card_says_wrong(store: AssetStore) -> None:
    with pytest.raises(AssetCardError, match=r"circle → circle_back → circle"):
        load_tokenizer("circle")
    with pytest.raises(CheckpointNotFoundError):
        load_tokenizer("gone")
    with pytest.raises(CheckpointNotFoundError, match=r"expected such a member, found inner/tokenizer\.model"):
        load_tokenizer("zipped_elsewhere")
    with pytest.raises(ModelGatedError, match=r"example\.com/ask"):
        load_tokenizer("gated")
    with pytest.raises(NotSupportedError, match="`tokenizer_ref`"):
        load_tokenizer("web")


@pytest.mark.parametrize(
    "name", ["spm", "sentencepiece.bpe", "source.spm", "12345", "pieces.json", "words.model", "x.bin"]
)
def test_the_bytes_tell_which_library_reads_a_file(tmp_path: Path, files: Mapping[str, bytes], name: str) -> None:
    for source, kind in (("tokenizer.json", Tokenizer), ("tokenizer.model", sentencepiece.SentencePieceProcessor)):
        (tmp_path / name).write_bytes(files[source])
        assert isinstance(load_tokenizer(tmp_path / name).model, kind)
    (tmp_path / name).write_bytes(b"IQ== 0\nIg== 1\n")
    if not name.endswith(".json"):
        with pytest.raises(NotSupportedError, match="tiktoken"):
            load_tokenizer(tmp_path / name)


def test_what_is_no_tokenizer(tmp_path: Path, files: Mapping[str, bytes]) -> None:
    (tmp_path / "vocab.txt").touch()
    with pytest.raises(NotSupportedError, match=r"vocab\.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(NotSupportedError, match="another kind"):
        load_tokenizer(tmp_path / "vocab.txt")
    for name, data in (("tokenizer.json", b"{}"), ("tokenizer.model", b"\x0anothing")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CorruptModelCheckpointError, match=name):
            load_tokenizer(tmp_path / name)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(NotSupportedError, match="tiktoken"):
        load_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(("name", "package"), [("tokenizer.json", "tokenizers"), ("tokenizer.model", "sentencepiece")])
def test_a_package_that_is_missing(
    tmp_path: Path, files: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    put(tmp_path, files, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotSupportedError, match=rf"'lading-hub\[tokenizers\]'`, or only `pip install {package}`"):
        load_tokenizer(tmp_path)


def test_a_zip_archive_that_is_damaged_or_lies(
    tmp_path: Path, files: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zip"
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        archive.writestr("tokenizer.model", files["tokenizer.model"])
    whole = path.read_bytes()
    encrypted = bytearray(whole)
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        encrypted[whole.index(header) + flags] |= 1
    for data in (
        whole[:-30],
        whole.replace(b"PK\1\2", b"PK\1\1"),
        bytes(encrypted),
        whole[:50] + b"\0" * 20 + whole[70:],
    ):
        path.write_bytes(data)
        with pytest.raises(CorruptModelCheckpointError, match="a readable member of a zip archive"):
            load_tokenizer(path / "tokenizer.model")

    monkeypatch.setattr("lading.checkpoints.tokenizer_file.MAX_SIZE", 100)
    path.write_bytes(whole)
    with pytest.raises(CorruptModelCheckpointError, match="at most 100 bytes"):
        load_tokenizer(path / "tokenizer.model")


def test_one_source_has_many_names() -> None:
    def stated(uri: str) -> TokenizerRef:
        return TokenizerRef(uri=uri, path=None)

    def ref(uri: str) -> CheckpointRef:
        return CheckpointRef(uri=uri, gated=False, info_url=None)

    assert same_source(None, ref("hg://a/b"))
    assert same_source(stated("hf://A/B@main"), ref("hg://a/b/folder"))
    assert not same_source(stated("hg://a/c"), ref("hg://a/b"))
    assert same_source(stated("https://a/b.tar"), ref("https://a/b.tar"))
    assert not same_source(stated("hg://a/b"), ref("file:///a/b"))


def test_the_nearest_card_of_the_chain_counts() -> None:
    base = AssetCard("base", {"tokenizer": "hg://a/b;gated=true", "tokenizer_path": "t.model"})
    card = AssetCard("card", {}, base)
    assert tokenizer_ref(card, {}.__getitem__) == TokenizerRef(uri="hg://a/b", path="t.model")
    other = AssetCard("other", {"tokenizer_ref": "card"}, base)
    assert tokenizer_ref(other, {"card": AssetCard("card", {})}.__getitem__) is None


def test_the_page_of_a_gated_tokenizer_is_no_place_of_one() -> None:
    card = AssetCard("card", {"tokenizer": "https://example.com/ask/;gated=true"})
    assert tokenizer_ref(card, {}.__getitem__) is None
