"""From a name, a path or a card to a model, on one device, through the real catalog."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lading
from lading import AssetCard, DigestMismatchError, NotSupportedError, get_asset_store, load_model
from lading.checkpoints.locate import index_checkpoint
from lading.families.llama import get_llama_model_hub
from lading.families.qwen import FAMILY, Qwen, QwenConfig, get_qwen_model_hub
from lading.formats import index
from lading.models.hub import GlobalModelLoader, load_with_report
from lading.models.loader import LoadOptions
from lading.models.loader import load as load_resolved
from lading.system.settings import Settings
from tests.helpers.make_checkpoint import make, qwen_config, tensors

CONFIG = qwen_config()

CARD = """\
name: tiny
model_family: qwen
model_config:
  model_dim: 32
  max_seq_len: 128
  vocab_size: 100
  tied_embeddings: true
  num_layers: 2
  num_attn_heads: 4
  num_key_value_heads: 2
  head_dim: 8
  qkv_proj_bias: false
  q_norm: true
  k_norm: true
  ffn_inner_dim: 64
checkpoint: tiny
---
name: tiny_llama
model_family: llama
model_arch: 7b
checkpoint: tiny
---
name: tiny_unknown
model_family: nobody
checkpoint: tiny
---
name: tiny_bad
base: tiny
model_config: {model_dimm: 3}
---
name: tiny_gated
model_family: qwen
url: https://example.com/ask
---
name: tiny_remote
model_family: qwen
checkpoint: hg://somebody/something
---
name: tiny_gone
base: tiny
checkpoint: gone
---
name: tiny_bf16_wide
base: tiny
model_config: {model_dim: 64, num_layers: 3, tied_embeddings: false}
"""


@pytest.fixture
def cards(home: Path, catalog: Path) -> Path:
    folder = home / "config" / "lading" / "cards"
    folder.mkdir(parents=True)
    make(folder / "tiny")
    (folder / "mine.yaml").write_text(CARD)
    return folder


def check(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    expected = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    state = model.state_dict()
    assert state.keys() == {*expected, "lm_head.weight"}
    for name, tensor in expected.items():
        assert state[name].dtype == dtype
        assert state[name].equal(tensor), name


# --- what is loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_without_a_card(catalog: Path, tmp_path: Path, shards: int, mmap: bool) -> None:
    model = load_model(make(tmp_path / "m", shards), dtype="auto", mmap=mmap)
    assert isinstance(model, Qwen)
    check(model, torch.bfloat16)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_card_by_its_name(cards: Path, mmap: bool) -> None:
    model = load_model("tiny", mmap=mmap)
    check(model)
    assert model.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


def test_tied_parameters_are_one(cards: Path) -> None:
    model: Any = load_model("tiny")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_default_dtype_is_torchs(cards: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        check(load_model("tiny"), torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)


def test_non_persistent_buffers_stay_in_float32(cards: Path) -> None:
    model = load_model("tiny", dtype=torch.bfloat16)
    buffers = dict(model.named_buffers())
    assert buffers
    assert all(b.dtype == torch.float32 and not b.is_meta for b in buffers.values() if b.is_floating_point())


def test_the_loaded_model_computes_and_trains(cards: Path) -> None:
    model = load_model("tiny")
    ids = torch.arange(10).unsqueeze(0)
    logits = model(ids)
    assert logits.shape == (1, 10, 100)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_config_of_ones_own_replaces_the_cards(cards: Path) -> None:
    hub = get_qwen_model_hub()
    config = hub.get_model_config("tiny")
    config.dropout_p = 0.3
    check(hub.load_model("tiny", config=config))


def test_a_card_object_that_is_in_no_catalog(cards: Path) -> None:
    base = get_asset_store().retrieve_card("tiny")
    card = AssetCard("mine", {"checkpoint": str(cards / "tiny")}, base)
    check(load_model(card))


def test_the_current_device_is_the_default(cards: Path) -> None:
    with pytest.raises(ValueError, match="meta"), torch.device("meta"):
        load_model("tiny")


def test_the_report_counts(cards: Path) -> None:
    _, report = load_with_report("tiny", dtype="auto")
    state = tensors()
    assert report.name == "tiny"
    assert report.model_class == "Qwen"
    assert report.parameters == sum(t.numel() for t in state.values())
    assert report.tensors == len(state)
    assert report.bytes_read == sum(t.nbytes for t in state.values())
    assert report.reads == 1
    assert report.dtypes == {"bfloat16": report.parameters}
    assert report.seconds > 0

    _, mapped = load_with_report("tiny", dtype="auto", mmap=True)
    assert (mapped.bytes_read, mapped.bytes_mapped) == (0, report.bytes_read)


def test_trained_tensors_that_a_model_does_not_need_are_in_the_report(catalog: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    further = {"mtp.layers.0.weight": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(state | further, folder / "model.safetensors")

    _, report = load_with_report(folder)
    assert report.dropped == ("mtp.layers.0.weight",)
    assert report.tensors == len(state)

    _, report = load_with_report(make(tmp_path / "other"))
    assert report.dropped == ()


# --- the catalog's part ----------------------------------------------------------------------------------------------


def test_the_manifest_is_written_at_the_first_load_and_used_at_the_second(
    cards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model("tiny")
    monkeypatch.setattr("lading.formats.index", lambda path: pytest.fail("the catalog knows the manifest"))
    check(load_model("tiny"))


@pytest.mark.parametrize("what", ["values", "tensors"])
def test_a_checkpoint_that_was_replaced_is_never_loaded_silently(cards: Path, what: str) -> None:
    load_model("tiny")
    file = cards / "tiny" / "model.safetensors"
    before = index(file)
    state = {name: tensor + 1 for name, tensor in load_file(file).items()}
    if what == "tensors":
        state["extra"] = torch.zeros(3)
    save_file(state, file, {"format": "pt"})
    assert index(file).tensors_equal(before) == (what == "values")

    for _ in range(2):
        with pytest.raises(DigestMismatchError, match="`lading index tiny`"):
            load_model("tiny")
    if what == "tensors":
        return
    loaded = load_model("tiny", dtype="auto", verify="never").state_dict()
    assert all(loaded[name].equal(tensor) for name, tensor in state.items())

    index_checkpoint("tiny")  # its owner says that it is meant
    loaded = load_model("tiny", dtype="auto").state_dict()
    assert all(loaded[name].equal(tensor) for name, tensor in state.items())


def test_an_index_that_comes_later_decides(cards: Path) -> None:
    load_model("tiny")
    make(cards / "tiny", shards=2)
    with pytest.raises(DigestMismatchError, match="other files or tensors"):
        load_with_report("tiny")

    index_checkpoint("tiny")
    _, report = load_with_report("tiny")
    assert report.shards == 2


def test_indexing_by_name_and_by_path(cards: Path) -> None:
    by_name = index_checkpoint("tiny")
    by_path = index_checkpoint(cards / "tiny")
    assert by_name.manifest == by_path.manifest
    assert by_name.uri == f"file://{cards / 'tiny'}"
    columns = lading.query("select status, parameters from models where name = 'tiny'")
    assert columns.rows == [("ready", sum(t.numel() for t in tensors().values()))]


def test_a_catalog_that_cannot_be_written_does_not_stop_a_load(
    cards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise lading.CatalogError("disk on fire")

    monkeypatch.setattr("lading.checkpoints.recording.record_checkpoint", fail)
    check(load_model("tiny"))
    assert "disk on fire" in caplog.text

    monkeypatch.setattr("lading.catalog.store.AssetStore.checkpoint", fail)
    check(load_model("tiny"))


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "an unknown name": (lambda c: load_model("tinny"), lading.ModelNotKnownError, "Did you mean 'tiny"),
    "a family that is not registered": (lambda c: load_model("tiny_unknown"), lading.AssetCardError, "'nobody'"),
    "a base-only card": (lambda c: load_model(AssetCard("x", {})), lading.AssetCardError, "model_family"),
    "another family's hub": (lambda c: get_llama_model_hub().load_model("tiny"), lading.AssetCardError, "llama.*qwen"),
    "another family's hub, a folder": (
        lambda c: get_llama_model_hub().load_model(make(c / "of_no_card")),
        lading.AssetCardError,
        "llama.*qwen",
    ),
    "overrides that do not fit": (lambda c: load_model("tiny_bad"), lading.AssetCardError, "model_dimm.*model_dim"),
    "a gated model": (lambda c: load_model("tiny_gated"), lading.ModelGatedError, "https://example.com/ask"),
    "a remote checkpoint": (lambda c: load_model("tiny_remote"), lading.FetchError, "hg://somebody/something"),
    "a path that is not there": (lambda c: load_model("tiny_gone"), FileNotFoundError, "gone"),
    "a folder that is not there": (lambda c: load_model(c / "gone"), FileNotFoundError, "gone"),
    "gangs and a device": (
        lambda c: load_model("tiny", gangs=lading.create_fake_gangs("cpu"), device="cpu"),
        ValueError,
        "together",
    ),
    "the meta device": (lambda c: load_model("tiny", device="meta"), ValueError, "meta"),
    "a dtype that is none": (lambda c: load_model("tiny", dtype="bf17"), TypeError, "bf17"),  # type: ignore[arg-type]
    "a dtype for integers": (lambda c: load_model("tiny", dtype=torch.int8), ValueError, "floating"),
    "another config": (lambda c: load_model("tiny", config={"model_dim": 3}), TypeError, "QwenConfig"),
    "another config for a path": (lambda c: load_model(c / "tiny", config=3), TypeError, "QwenConfig"),
    "no card at all": (lambda c: load_model(3), TypeError, "int"),  # type: ignore[arg-type]
}


@pytest.mark.few(7)
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(cards: Path, case: str) -> None:
    call, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        call(cards)


def test_all_that_does_not_fit_is_reported_together(cards: Path) -> None:
    with pytest.raises(lading.ModelCheckpointMismatchError) as caught:
        load_model("tiny_bf16_wide")
    text = "\n".join(caught.value.problems)
    assert "missing: lm_head.weight [100, 64]" in text
    assert "missing: model.layers.2.mlp.up_proj.weight" in text
    assert "mis-shaped: model.embed_tokens.weight is expected to be [100, 64], but is [100, 32]" in text


def test_an_unexpected_tensor_is_reported(catalog: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    save_file(tensors() | {"model.extra": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(lading.ModelCheckpointMismatchError, match=r"unexpected: model\.extra"):
        load_model(folder)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_tied_copy_in_the_file_must_be_equal(catalog: Path, tmp_path: Path, mmap: bool) -> None:
    folder = make(tmp_path / "m")
    state = tensors()
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    check(load_model(folder, mmap=mmap))

    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(lading.ModelCheckpointMismatchError, match="ties"):
        load_model(folder, mmap=mmap)

    # An untrained row may hold anything.
    holed = state["model.embed_tokens.weight"].clone()
    holed[0, 0] = torch.nan
    save_file(
        state | {"model.embed_tokens.weight": holed, "lm_head.weight": holed.clone()}, folder / "model.safetensors"
    )
    assert load_model(folder, mmap=mmap).get_parameter("model.embed_tokens.weight")[0, 0].isnan()


def test_quantized_checkpoints_are_refused(catalog: Path, tmp_path: Path) -> None:
    stated = make(tmp_path / "stated", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(lading.NotSupportedError, match="gptq"):
        load_model(stated)

    silent = make(tmp_path / "silent")
    state = tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, silent / "model.safetensors")
    with pytest.raises(lading.NotSupportedError, match="F8_E4M3"):
        load_model(silent)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": 3}', '{"model_type": "gpt9"}'])
def test_nonsense_for_a_config_json(catalog: Path, tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises((lading.CorruptModelCheckpointError, lading.NotSupportedError), match="config"):
        load_model(folder)


def test_a_folder_without_config_json(catalog: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    os.remove(folder / "config.json")
    with pytest.raises(lading.NotSupportedError, match=r"no config\.json"):
        load_model(folder)
    check(get_qwen_model_hub().load_custom_model(folder, CONFIG))
    check(get_qwen_model_hub().load_custom_model(folder / "model.safetensors", CONFIG))


def test_a_damaged_file(cards: Path) -> None:
    file = cards / "tiny" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(lading.CorruptModelCheckpointError, match=r"model\.safetensors"):
        load_model("tiny")


# --- hubs ------------------------------------------------------------------------------------------------------------


def test_a_hub_knows_its_cards_and_architectures(cards: Path) -> None:
    hub = get_qwen_model_hub()
    names = {card.name for card in hub.iter_cards()}
    assert {"tiny", "qwen3_0.6b", "qwen25_7b"} <= names
    assert not names & {"tiny_llama", "llama3_8b"}
    assert {"qwen3_0.6b", "qwen25_7b"} <= hub.get_archs()


def test_configurations_are_fresh(cards: Path) -> None:
    hub = get_qwen_model_hub()
    one = hub.get_arch_config("qwen3_0.6b")
    one.num_layers = 1
    assert hub.get_arch_config("qwen3_0.6b").num_layers == 28
    assert hub.get_model_config("qwen3_0.6b") == hub.get_arch_config("qwen3_0.6b")
    assert hub.get_model_config("tiny") == CONFIG


def test_unknown_architectures(cards: Path) -> None:
    hub = get_qwen_model_hub()
    assert hub.maybe_get_arch_config("qwen9") is None
    with pytest.raises(lading.ModelArchitectureNotKnownError) as caught:
        hub.get_arch_config("qwen9")
    assert (caught.value.arch, caught.value.family) == ("qwen9", "qwen")
    with pytest.raises(lading.AssetCardError, match="qwen9"):
        hub.get_model_config(AssetCard("x", {"model_family": "qwen", "model_arch": "qwen9"}))
    with pytest.raises(lading.ModelNotKnownError) as unknown:
        hub.get_model_config("nobody")
    assert unknown.value.name == "nobody"


def test_a_new_model_is_random_and_whole(catalog: Path) -> None:
    model = get_qwen_model_hub().create_new_model(CONFIG, device="cpu", dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())
    assert model.model.embed_tokens.weight.std() > 0
    assert model(torch.arange(5).unsqueeze(0)).isfinite().all()


def test_a_new_model_on_the_meta_device(catalog: Path) -> None:
    hub = get_qwen_model_hub()
    model = hub.create_new_model(CONFIG, meta=True)
    assert all(p.is_meta for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="meta"):
        hub.create_new_model(CONFIG, device="meta")
    with pytest.raises(TypeError, match="QwenConfig"):
        hub.create_new_model(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("mmap", [False, True])
def test_iterating_over_a_checkpoint(catalog: Path, tmp_path: Path, mmap: bool) -> None:
    folder = make(tmp_path / "m", shards=2)
    pairs = get_qwen_model_hub().iter_checkpoint(folder, CONFIG, mmap=mmap)
    name, tensor = next(pairs)
    assert tensor.equal(tensors()[name])
    rest = dict(pairs)
    assert {name, *rest} == tensors().keys()
    assert all(rest[n].equal(t) for n, t in tensors().items() if n != name)

    with pytest.raises(FileNotFoundError):
        next(get_qwen_model_hub().iter_checkpoint(tmp_path / "gone", CONFIG))


@pytest.mark.parametrize("mmap", [False, True])
def test_iterating_over_numbers_that_torch_has_no_tensors_of(catalog: Path, tmp_path: Path, mmap: bool) -> None:
    header = b'{"packed":{"dtype":"F4","shape":[4,8],"data_offsets":[0,16]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))

    with pytest.raises(NotSupportedError, match="'packed' is stored as F4"):
        next(get_qwen_model_hub().iter_checkpoint(path, CONFIG, mmap=mmap))


def test_an_accessor_checks_the_classes_it_was_made_with(catalog: Path) -> None:
    with pytest.raises(lading.ModelFamilyNotKnownError):
        lading.ModelHubAccessor("nobody", Qwen, QwenConfig)()
    with pytest.raises(lading.InternalError, match="configurations"):
        lading.ModelHubAccessor("qwen", Qwen, dict)()


def test_the_global_loader_takes_a_store(cards: Path) -> None:
    check(GlobalModelLoader(get_asset_store()).load("tiny"))


def test_overlays_choose_the_checkpoint(cards: Path) -> None:
    (cards / "overlay.yaml").write_text(
        f"name: tiny_remote@user\nbase: tiny\ncheckpoint: {json.dumps(str(cards / 'tiny'))}\n"
    )
    check(load_model("tiny_remote"))
    with pytest.raises(lading.FetchError):
        load_model("tiny_remote@")


def test_a_listing_sees_overlays(cards: Path) -> None:
    (cards / "overlay.yaml").write_text(
        f"name: tiny_gated@user\nbase: tiny\ncheckpoint: {json.dumps(str(cards / 'tiny'))}\n---\n"
        "name: tiny_remote@user\ncheckpoint: gone\n---\n"
        "name: on_top\nbase: tiny_gated\n"
    )
    found = {model.name: model for model in get_asset_store().models()}
    assert (found["tiny_gated"].status, found["tiny_gated"].local_path) == ("ready", str(cards / "tiny"))
    assert found["on_top"].status == "ready"
    assert found["tiny_remote"].status == "broken"
    assert "gone" in str(found["tiny_remote"].problem)

    load_model("tiny_gated")
    assert lading.query("select status from models where name = 'tiny_gated'").rows == [("ready",)]


def test_what_checkpoints_lack_by_design_is_as_in_a_new_model(tmp_path: Path) -> None:
    path = make(tmp_path / "m")
    state = load_file(path / "model.safetensors")
    lacking = {f"model.layers.{n}.self_attn.{name}_proj.weight" for n in range(2) for name in "qo"}
    save_file({name: tensor for name, tensor in state.items() if name not in lacking}, path / "model.safetensors")
    family = replace(FAMILY, may_lack=lambda config, names: [name for name in names if "_proj" in name])

    def load(gangs: lading.Gangs, dtype: Any = "auto", family: Any = family, path: Path = path) -> dict[str, Any]:
        torch.manual_seed(3)
        options = LoadOptions(gangs=gangs, dtype=dtype, settings=Settings.from_environment())
        return dict(load_resolved(path, family, None, options, config=CONFIG)[0].named_parameters())

    with pytest.raises(lading.ModelCheckpointMismatchError, match="4 problems"):
        load(lading.create_fake_gangs("cpu"), family=FAMILY)

    torch.manual_seed(3)
    new = dict(get_qwen_model_hub().create_new_model(CONFIG, dtype=torch.bfloat16).named_parameters())
    whole = load(lading.create_fake_gangs("cpu"))
    assert all(torch.equal(found, new[name] if name in lacking else state[name]) for name, found in whole.items())

    # Of ranks, each has its part, as if all of it were in the checkpoint.
    full = make(tmp_path / "full")
    save_file({name: tensor.detach() for name, tensor in whole.items()}, full / "model.safetensors")
    for rank in range(4):
        with lading.simulate_gangs(rank, tp=2, sdp=2) as gangs:
            expected = load(gangs, torch.bfloat16, FAMILY, full)
            for name, found in load(gangs, torch.bfloat16).items():
                assert torch.equal(found.to_local(), expected[name].to_local()), name
