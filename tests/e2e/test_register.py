"""The last lines of a training script: the model is exported, and gets a name in the catalog."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lading
from lading.errors import (
    AssetCardError,
    AssetNotFoundError,
    CheckpointNotFoundError,
    DigestMismatchError,
    NotSupportedError,
)
from lading.families.qwen import get_qwen_model_hub
from tests.helpers.make_adapter import Q_PROJ, factors, write_adapter
from tests.helpers.make_checkpoint import CARD_CONFIG, make, qwen_config, tensors


@pytest.fixture(autouse=True)
def _base(catalog: Path, tmp_path: Path) -> None:
    """A catalog with a card `base` of an architecture `tiny_arch`."""
    path = tmp_path / "base.yaml"
    values = CARD_CONFIG.removeprefix("model_config: ")
    path.write_text(
        f"architecture: tiny_arch\nfamily: qwen\nconfig: {values}---\n"
        "name: base\nmodel_family: qwen\nmodel_arch: tiny_arch\nlicense: mit\ncheckpoint: hg://org/base\n"
    )
    lading.import_cards(path)


def metadata(name: str) -> dict[str, object]:
    return dict(lading.get_asset_store().retrieve_card(name).metadata)


def test_a_checkpoint_gets_the_name_and_the_fields(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")

    card = lading.register_model("mine", folder, license="apache-2.0", steps=500, model_config={"dropout_p": 0.1})

    assert card.name == "mine"
    assert dict(card.metadata) == {
        "model_family": "qwen",
        "model_arch": "tiny_arch",
        "checkpoint": str(folder),
        "license": "apache-2.0",
        "steps": 500,
        "model_config": {"dropout_p": 0.1},
    }
    assert get_qwen_model_hub().get_model_config("mine").dropout_p == 0.1
    assert lading.load_model("mine", device="cpu", progress=False) is not None
    (summary,) = lading.get_asset_store().models("mine")
    assert (summary.status, summary.bytes, summary.source) == ("ready", 43_648, "added")


def test_a_name_is_given_again(tmp_path: Path) -> None:
    lading.register_model("mine", make(tmp_path / "one"), steps=1)
    lading.register_model("mine", str(make(tmp_path / "two")), epochs=2)

    assert metadata("mine")["checkpoint"] == str(tmp_path / "two")
    assert "steps" not in metadata("mine")


def test_a_model_that_was_trained_again_is_the_right_one(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    lading.register_model("mine", folder)
    lading.verify_model("mine", progress=False)
    state = {name: tensor + 1 for name, tensor in tensors().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    (again,) = lading.add_checkpoints(folder)
    assert again.status == "unchanged"
    with pytest.raises(DigestMismatchError):
        lading.load_model("mine", device="cpu", progress=False, verify="always")
    lading.register_model("mine", folder)

    model = lading.load_model("mine", device="cpu", progress=False, verify="always")
    assert torch.equal(model.state_dict()["model.norm.weight"], state["model.norm.weight"].float())
    assert lading.verify_model("mine", progress=False).good


def test_a_card_inherits_from_its_base(tmp_path: Path) -> None:
    lading.register_model("tuned", make(tmp_path / "tuned"), base="base")
    assert metadata("tuned") == {"base": "base", "checkpoint": str(tmp_path / "tuned")}
    assert lading.get_asset_store().models("tuned")[0].license == "mit"
    assert lading.check_model("tuned").fits

    lading.register_model("longer", make(tmp_path / "longer", max_position_embeddings=256), base="base")
    assert metadata("longer") == {
        "base": "base", "model_family": "qwen", "model_arch": None, "checkpoint": str(tmp_path / "longer"),
    }  # fmt: skip

    assert get_qwen_model_hub().load_model("longer", device="cpu", progress=False) is not None
    assert lading.check_model("longer").fits

    bare = make(tmp_path / "bare")
    (bare / "config.json").unlink()
    lading.register_model("bare", bare / "model.safetensors", base="base")
    assert lading.check_model("bare").fits


def test_an_adapter_is_registered_on_its_base(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", factors(Q_PROJ, 32, 32), base_model_name_or_path="org/base")
    lading.register_model("tuned", make(tmp_path / "tuned"))

    lading.register_model("by-lora", folder, base="tuned")

    assert metadata("by-lora") == {"base": "tuned", "adapter": str(folder)}
    assert lading.check_model("by-lora").fits
    with pytest.raises(NotSupportedError, match="LoRA adapter"):
        lading.register_model("without", folder)
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes([3]) + bytes(40))
    with pytest.raises(NotSupportedError, match="gguf"):
        lading.register_model("other", folder / "model.gguf")


def test_what_cannot_be_registered(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    bare = make(tmp_path / "bare")
    (bare / "config.json").unlink()
    with pytest.raises(AssetCardError, match=r"base\.yaml"):
        lading.register_model("base", folder)
    with pytest.raises(AssetCardError, match=r"qwen\.yaml"):
        lading.register_model("qwen3_0.6b", folder)
    for name in ("", "a@user", "x\ny"):
        with pytest.raises(AssetCardError):
            lading.register_model(name, folder)
    with pytest.raises(AssetCardError):
        lading.register_model("mine", folder, license=5)
    with pytest.raises(TypeError):
        lading.register_model("mine", folder, note=object())
    with pytest.raises(AssetNotFoundError):
        lading.register_model("mine", folder, base="unknown")
    with pytest.raises(CheckpointNotFoundError):
        lading.register_model("mine", tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFoundError):
        lading.register_model("mine", tmp_path)
    with pytest.raises(NotSupportedError, match="model_family"):
        lading.register_model("mine", bare)
    assert "mine" not in lading.get_asset_store().asset_names
    lading.register_model("mine", folder)
    with pytest.raises(AssetCardError, match="cycle"):
        lading.register_model("mine", folder, base="mine")


# --- exports ----------------------------------------------------------------------------------------------------------


class Saved:
    """A tokenizer that saves itself as those of transformers do."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")
        (Path(folder) / "tokenizer_config.json").write_text("{}")


class Single:
    """A tokenizer that saves itself as those of tokenizers do."""

    def save(self, path: str) -> None:
        Path(path).write_text("{}")


@pytest.fixture
def model() -> object:
    return get_qwen_model_hub().create_new_model(qwen_config(), device="cpu")


def test_an_export_is_registered_with_its_tokenizer(tmp_path: Path, model: object) -> None:
    beside = tmp_path / "before"
    beside.mkdir()
    (beside / "tokenizer.model").write_bytes(b"old")
    (beside / "generation_config.json").write_text("{}")

    report = lading.export_model(
        model, "qwen", qwen_config(), tmp_path / "out", beside=beside, tokenizer=Saved(), register="mine"
    )  # fmt: skip

    assert set(report.files) == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    }  # fmt: skip
    assert metadata("mine") == {
        "model_family": "qwen", "model_arch": "tiny_arch", "checkpoint": str(tmp_path / "out"),
    }  # fmt: skip
    assert lading.load_model("mine", device="cpu", progress=False) is not None


def test_tokenizers_of_other_kinds(tmp_path: Path, model: object) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    loaded = lading.load_tokenizer(Path(__file__).parents[1] / "parity" / "fairseq2_tokenizers" / "tokenizer.json")
    for name, tokenizer in (("single", Single()), ("loaded", loaded), ("folder", folder), ("text", str(folder))):
        report = lading.export_model(model, "qwen", qwen_config(), tmp_path / name, tokenizer=tokenizer)
        assert set(report.files) == {"config.json", "model.safetensors", "tokenizer.json"}
        assert (tmp_path / name / "config.json").read_text() != "{}"
    assert lading.load_tokenizer(tmp_path / "loaded").encode("coal").equal(loaded.encode("coal"))
    with pytest.raises(TypeError, match="tokenizer"):
        lading.export_model(model, "qwen", qwen_config(), tmp_path / "none", tokenizer=object())
    assert not (tmp_path / "none").exists()


def test_a_name_that_is_not_free_is_known_before_the_export(tmp_path: Path, model: object) -> None:
    with pytest.raises(AssetCardError, match=r"base\.yaml"):
        lading.export_model(model, "qwen", qwen_config(), tmp_path / "out", register="base")
    assert not (tmp_path / "out").exists()
