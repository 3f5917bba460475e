"""Names in gangs: rank 0 finds what a name means, and all ranks load that."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

import lading
from lading.gangs import create_gangs
from tests.distributed.workers import Pool
from tests.helpers.make_checkpoint import CONFIG, make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a card, and one whose card states another rotary base."""
    folder = tmp_path_factory.mktemp("names")
    make(folder / "bare")
    (folder / "cards.yaml").write_text(
        f"name: mine\nmodel_family: qwen\ncheckpoint: {make(folder / 'carded')}\nmodel_config: {{rope_theta: 77.0}}\n"
    )

    return folder


def load(folder: Path, name: str | Path) -> tuple[str, float, list[str]]:
    """Return the class of the model, its rotary base, and the warnings of this rank."""
    torch.set_num_threads(1)
    os.environ |= {
        "LADING_DATABASE_URL": f"sqlite:///{folder}/c.sqlite",
        "XDG_CONFIG_HOME": str(folder),
        "LADING_OFFLINE": "1",
        "LADING_CARDS": str(folder / "cards.yaml"),
    }
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lading").addHandler(handler)
    try:
        with create_gangs("cpu", tp=2) as gangs:
            model = lading.load_model(name, gangs=gangs, progress=False)
    finally:
        logging.getLogger("lading").removeHandler(handler)

    return type(model).__name__, model.model.rotary_emb.theta, said


@pytest.mark.few(1)
@pytest.mark.parametrize("as_text", [True, False])
def test_a_path_is_the_card_that_has_it_on_all_ranks(pool2: Pool, folder: Path, as_text: bool) -> None:
    kind = str if as_text else Path
    assert pool2.values(load, folder, kind(folder / "bare")) == [("Qwen", CONFIG["rope_theta"], [])] * 2
    (first, second) = pool2.values(load, folder, kind(folder / "carded"))
    assert first[:2] == second[:2] == ("Qwen", 77.0)
    assert ["contradicts the config.json" in text for text in first[2]] == [True]
    assert second[2] == []  # once in a gang


def test_an_unknown_name_is_unknown_on_all_ranks(pool2: Pool, folder: Path) -> None:
    for name in ("mien", "some/where"):
        for outcome in pool2.run(load, folder, name):
            with pytest.raises(lading.ModelNotKnownError, match=name):
                outcome.get()


def encode(folder: Path, rank_folders: list[str]) -> list[int]:
    with create_gangs("cpu") as gangs:
        os.chdir(folder / rank_folders[gangs.root.rank])
        found = lading.load_tokenizer(Path("words.model"), gangs=gangs, family="mistral").encode("a bill")
    return list(found.tolist())


def test_rank_0_reads_the_tokenizer_for_all(pool2: Pool, tmp_path: Path) -> None:
    words = Path(__file__).parents[1] / "parity" / "fairseq2_tokenizers" / "plain.model"
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "words.model").write_bytes(words.read_bytes())
    expected = lading.load_tokenizer(words, family="mistral").encode("a bill").tolist()

    assert pool2.values(encode, tmp_path, ["here", "elsewhere"]) == [expected] * 2
    for outcome in pool2.run(encode, tmp_path, ["elsewhere", "here"]):
        with pytest.raises(FileNotFoundError, match=r"words\.model"):
            outcome.get()
