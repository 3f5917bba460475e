"""docs/how-to/migrate-from-fairseq2.md: each row of its table, run over a tiny model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import lading
from lading.catalog import memory_cards
from lading.families.qwen import FAMILY, Qwen
from lading.system import entry_points
from tests.helpers.make_checkpoint import make, qwen_config

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "migrate-from-fairseq2.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `.*` .*\| `(.*)`(?:,[^|`]*)? \|$", PAGE, re.MULTILINE)
IMPORTS = [row for row in ROWS if " import " in row]
CALLS = [row for row in ROWS if row not in IMPORTS]


@pytest.fixture
def names(catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a program has imported and made by then."""
    monkeypatch.setattr(entry_points, "_HERE", {})
    monkeypatch.setattr(memory_cards, "_CARDS", {})
    monkeypatch.setattr(memory_cards, "_ARCHITECTURES", {})
    path = make(tmp_path / "tiny")
    shutil.copy(Path(__file__).parents[1] / "parity" / "fairseq2_tokenizers" / "tokenizer.json", path)
    run = tmp_path / "run"
    shutil.copytree(path, run / "step_10" / "model")
    fields = {"model_family": "qwen", "model_config": {"_set_": asdict(qwen_config())}}
    (run / "model.yaml").write_text(json.dumps({"name": "checkpoint", **fields}))
    entry = {"name": "my_qwen", **fields, "checkpoint": str(path), "tokenizer_family": "qwen"}
    lading.import_cards([entry])
    file = tmp_path / "cards.yaml"
    file.write_text(json.dumps({**entry, "name": "of_a_file"}))

    class OwnStore:
        def retrieve_card(self, name: str) -> lading.AssetCard:
            raise lading.AssetNotFoundError(name)

        def maybe_retrieve_card(self, name: str) -> lading.AssetCard | None:
            return lading.AssetCard(name, entry)

        def find_cards(self, field: str, value: object) -> Iterator[lading.AssetCard]:
            return iter(())

        asset_names = frozenset({"mine"})

    names: dict[str, Any] = {"torch": torch, "lading": lading, "Qwen": Qwen, "family": FAMILY}
    for line in IMPORTS:
        exec(line, names)
    store = lading.get_asset_store()
    names |= {"hub": names["get_qwen_model_hub"](), "store": store, "card": store.retrieve_card("my_qwen")}
    names |= {"own_store": OwnStore(), "entries": [{**entry, "name": "in_memory"}], "file": file, "run": run}
    names |= {"tokenizer": lading.load_tokenizer("my_qwen"), "indices": torch.tensor([5, 6])}
    names |= {"config": qwen_config(), "path": path, "gangs": lading.create_fake_gangs("cpu")}

    return names | {"dtype": torch.float32, "mmap": True}


def test_the_table_is_read_whole() -> None:
    table = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(ROWS) == len(table) > 30
    assert len(IMPORTS) == 11


@pytest.mark.parametrize("call", CALLS)
def test_a_row(names: dict[str, Any], call: str) -> None:
    if "last_checkpoint" in call:
        lading.register_checkpoint_models(names["run"])
    if call.startswith("hub = "):
        exec(call, names)
        return

    result = eval(call, names)
    if "load" in call and "create" not in call:
        assert isinstance(result, lading.Tokenizer if "okenizer" in call else Qwen | dict), result
    if "register_family" in call:
        assert lading.get_model_family_name(lading.AssetCard("x", {"model_family": "mine"})) == "mine"
    elif call.startswith("lading.import_cards"):
        assert result.added
        assert isinstance(lading.load_model(result.added[0]), Qwen)
    elif "maybe_get" in call:
        assert result is None
    elif "create_encoder" in call:
        assert result.equal(names["tokenizer"].create_raw_encoder()("the ship"))
    elif "register_checkpoint" not in call:
        assert result


def test_the_differences(names: dict[str, Any], tmp_path: Path) -> None:
    rank0_only = lading.load_model("my_qwen", load_rank0_only=True)
    assert all(map(torch.equal, rank0_only.parameters(), lading.load_model("my_qwen").parameters()))
    assert lading.get_asset_store().retrieve_card("my_qwen").field("checkpoint").as_uri().startswith("file://")
    (names["path"] / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(lading.ModelCheckpointError):
        lading.load_model("my_qwen")
