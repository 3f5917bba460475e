"""Models of transformers as lading loads them, against ``from_pretrained``: bit-equal numbers, equal outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module

from lading import convert_checkpoint, load_model, simulate_gangs
from lading.errors import ModelCheckpointMismatchError
from lading.families.hg import HuggingFaceModelConfig, get_hg_model_hub

DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
IMAGE = {key: ENCODER[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
IMAGE |= {"image_size": 16, "patch_size": 4}

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
WAVE = torch.randn(2, 800, generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
MEL = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Case:
    id: str
    kls: str
    config: str
    values: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=lambda: {"input_ids": IDS})
    shard: str = "50GB"
    """The size of the files that it is saved as."""


CASES = [
    Case("decoder", "PhiForCausalLM", "PhiConfig", DECODER, shard="10KB"),
    Case("rotary", "CohereForCausalLM", "CohereConfig", DECODER, shard="10KB"),  # tied, frequencies computed
    Case(
        "gpt2", "GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    ),  # tied, and weights lie the other way round
    Case("encoder", "RobertaForMaskedLM", "RobertaConfig", ENCODER),
    Case(
        "encoder-decoder",
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 64},
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    Case(
        "computed-positions",  # which its checkpoints lack
        "MarianMTModel",
        "MarianConfig",
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 64}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 16}
        | {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "decoder_vocab_size": 64},
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    Case("vision", "ViTForImageClassification", "ViTConfig", IMAGE, {"pixel_values": PIXELS}),
    Case(
        "convolutions",  # with persistent buffers, one of integers
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        {"pixel_values": PIXELS},
    ),
    Case(
        "speech",  # normalised weights, whose two parts were renamed in the course of time
        "HubertForCTC",
        "HubertConfig",
        ENCODER
        | {
            "conv_dim": (16, 16),
            "conv_kernel": (10, 3),
            "conv_stride": (5, 2),
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
        },
        {"input_values": WAVE},
    ),
    Case(
        "speech-to-text",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 32,
            "vocab_size": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        {"input_features": MEL, "decoder_input_ids": IDS},
    ),
    Case(
        "experts",
        "OlmoeForCausalLM",
        "OlmoeConfig",
        DECODER | {"num_experts": 4, "num_experts_per_tok": 2},
        shard="20KB",
    ),
    Case(
        "experts-and-dense",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        DECODER
        | {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
        | {"num_hidden_layers": 3, "shared_expert_intermediate_size": 24},
    ),
    Case(
        "two-towers",
        "CLIPModel",
        "CLIPConfig",
        {"text_config": DECODER | {"max_position_embeddings": 16}, "vision_config": IMAGE, "projection_dim": 16},
        {"input_ids": IDS, "pixel_values": PIXELS},
    ),
    Case(
        "state-space",
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4},
    ),
]

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def make(case: Case, folder: Path) -> None:
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, case.kls)(getattr(transformers, case.config)(**case.values))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_(std=0.2).abs_()  # variances are positive
    model.save_pretrained(folder, max_shard_size=case.shard)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    made: dict[str, Path] = {}

    def folder_of(case: Case) -> Path:
        if case.id not in made:
            made[case.id] = tmp_path_factory.mktemp(case.id)
            make(case, made[case.id])
        return made[case.id]

    return folder_of


def theirs(kls: str, folder: Path, **options: Any) -> Module:
    import transformers

    model: Module = getattr(transformers, kls).from_pretrained(folder, **options)

    return model


def tensors(model: Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def assert_equal(ours: Module, expected: Module) -> None:
    assert type(ours) is type(expected)
    found, wanted = tensors(ours), tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert len(set(map(id, found.values()))) == len(set(map(id, wanted.values())))


def logits(model: Module, case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.inputs.items()}
    with torch.no_grad():
        output = model.eval()(**inputs)

    return output["logits_per_image" if "logits_per_image" in output else "logits"]


@pytest.mark.few(6)
@by_case
def test_a_folder_loads_as_from_pretrained_loads_it(case: Case, folder: Callable[[Case], Path]) -> None:
    path = folder(case)
    expected = theirs(case.kls, path)

    read, mapped = load_model(path), load_model(path, mmap=True)

    assert read.training
    for ours in (read, mapped):
        assert_equal(ours, expected)
        assert torch.equal(logits(ours, case), logits(expected, case))


@pytest.mark.few(5)
@by_case
def test_in_half_precision_too(case: Case, folder: Callable[[Case], Path]) -> None:
    path = folder(case)
    expected = theirs(case.kls, path, dtype=torch.bfloat16)

    ours = load_model(path, dtype=torch.bfloat16)

    assert_equal(ours, expected)
    assert ours.config.dtype == torch.bfloat16
    assert torch.equal(logits(ours, case, torch.bfloat16), logits(expected, case, torch.bfloat16))


def test_some_are_of_several_files(folder: Callable[[Case], Path]) -> None:
    counts = [len([*folder(case).glob("*.safetensors")]) for case in CASES]

    assert sum(count > 1 for count in counts) >= 3


@pytest.mark.parametrize("id_", ["decoder", "gpt2", "experts", "speech"])
def test_the_model_without_its_head_loads_from_a_checkpoint_with_one(id_: str, folder: Callable[[Case], Path]) -> None:
    import transformers

    case = next(case for case in CASES if case.id == id_)
    path = folder(case)
    kls = transformers.MODEL_MAPPING[getattr(transformers, case.config)].__name__

    ours = get_hg_model_hub().load_custom_model(path, HuggingFaceModelConfig(model_type="auto"))

    assert_equal(ours, theirs(kls, path))


def test_what_a_model_has_and_its_checkpoint_does_not_is_an_error(folder: Callable[[Case], Path]) -> None:
    path = folder(next(case for case in CASES if case.id == "encoder"))

    with pytest.raises(ModelCheckpointMismatchError, match=r"missing: pooler\.dense\.weight"):
        get_hg_model_hub().load_custom_model(path, HuggingFaceModelConfig(model_type="auto"))


def test_what_from_pretrained_passes_over_may_be_missing(tmp_path: Path, folder: Callable[[Case], Path]) -> None:
    path = folder(next(case for case in CASES if case.id == "computed-positions"))
    state = load_file(path / "model.safetensors")
    lacking = {"model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"}
    expected = theirs("MarianMTModel", path)
    assert lacking == expected.state_dict().keys() - state.keys() - set(expected.all_tied_weights_keys)

    del state["final_logits_bias"]
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    for dtype in (torch.bfloat16, "auto"):
        found = load_model(tmp_path, dtype=dtype)
        assert not found.final_logits_bias.any()
        assert_equal(found, theirs("MarianMTModel", tmp_path, dtype=dtype))

    del state["model.shared.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelCheckpointMismatchError, match=r"1 problem.*\n +missing: model\.shared\.weight"):
        load_model(tmp_path)


def test_the_model_with_a_tied_head_loads_from_a_checkpoint_without_one(
    tmp_path: Path, folder: Callable[[Case], Path]
) -> None:
    case = next(case for case in CASES if case.id == "gpt2")
    theirs("GPT2Model", folder(case)).save_pretrained(tmp_path)
    expected = theirs("GPT2LMHeadModel", tmp_path)

    config = HuggingFaceModelConfig(model_type="causal_lm")
    ours = get_hg_model_hub().load_custom_model(tmp_path, config)

    assert_equal(ours, expected)
    assert ours.lm_head.weight is ours.transformer.wte.weight


T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 64}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "max_position_embeddings": 16,
}  # fmt: skip


def own_output(state: dict[str, Tensor], table: str, output: str) -> dict[str, Tensor]:
    return state | {output: state[table] * 0.3 + 1}


def all_names(state: dict[str, Tensor], table: str, output: str) -> dict[str, Tensor]:
    parts = {f"{part}.embed_tokens.weight": state[table].clone() for part in ("encoder", "decoder")}
    return own_output(state, table, output) | parts


def under_a_further_name(state: dict[str, Tensor], table: str, output: str) -> dict[str, Tensor]:
    state = own_output(state, table, output)
    return state | {"decoder.embed_tokens.weight": state.pop(table)}


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("kls", "config", "values", "table", "output", "edit"),
    [
        ("T5ForConditionalGeneration", "T5Config", T5, "shared.weight", "lm_head.weight", own_output),
        ("T5ForConditionalGeneration", "T5Config", T5, "shared.weight", "lm_head.weight", all_names),
        ("T5ForConditionalGeneration", "T5Config", T5, "shared.weight", "lm_head.weight", under_a_further_name),
        ("MT5ForConditionalGeneration", "MT5Config", T5, "shared.weight", "lm_head.weight", own_output),
        ("UMT5ForConditionalGeneration", "UMT5Config", T5, "shared.weight", "lm_head.weight", own_output),
        ("LongT5ForConditionalGeneration", "LongT5Config", T5, "shared.weight", "lm_head.weight", own_output),
        ("BartForConditionalGeneration", "BartConfig", BART, "model.shared.weight", "lm_head.weight", own_output),
        (
            "BertLMHeadModel",
            "BertConfig",
            ENCODER | {"is_decoder": True},
            "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.weight",
            own_output,
        ),
        ("BertForMaskedLM", "BertConfig", ENCODER, "cls.predictions.bias", "cls.predictions.decoder.bias", own_output),
        (
            "Qwen3ForCausalLM",
            "Qwen3Config",
            DECODER | {"tie_word_embeddings": True},
            "model.embed_tokens.weight",
            "lm_head.weight",
            own_output,
        ),
    ],
)
def test_what_is_tied_and_stored_twice_with_other_numbers_stays_apart(
    tmp_path: Path, kls: str, config: str, values: dict[str, Any], table: str, output: str, edit: Callable[..., Any]
) -> None:
    make(Case("tied", kls, config, values), tmp_path)
    state = edit(load_file(tmp_path / "model.safetensors"), table, output)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    expected = theirs(kls, tmp_path)
    assert torch.equal(expected.get_parameter(output), state[output])

    ours = get_hg_model_hub().load_model(tmp_path)

    assert_equal(ours, expected)
    assert ours.all_tied_weights_keys == expected.all_tied_weights_keys
    # However many devices there are, and however the files are rewritten.
    sharded = get_hg_model_hub().load_model(tmp_path, gangs=simulate_gangs(0, sdp=2))
    part = sharded.get_parameter(output).to_local()  # type: ignore[attr-defined]
    assert torch.equal(part, state[output][: len(part)])
    if kls.startswith(("T5", "Bart")):
        convert_checkpoint(tmp_path, tmp_path / "out", progress=False)
        assert_equal(get_hg_model_hub().load_model(tmp_path / "out"), expected)


def test_equal_copies_of_what_is_tied_are_one(tmp_path: Path) -> None:
    make(Case("tied", "T5ForConditionalGeneration", "T5Config", T5), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"lm_head.weight": state["shared.weight"].clone()}, tmp_path / "model.safetensors")

    ours = load_model(tmp_path)

    assert ours.lm_head.weight is ours.shared.weight


@pytest.mark.parametrize("edit", ["missing", "narrower"])
def test_counters_of_batches(tmp_path: Path, folder: Callable[[Case], Path], edit: str) -> None:
    path = folder(next(case for case in CASES if case.id == "convolutions"))
    state = load_file(path / "model.safetensors")
    counters = {name: tensor + 3 for name, tensor in state.items() if name.endswith("num_batches_tracked")}
    assert counters
    narrow = {} if edit == "missing" else {name: tensor.int() for name, tensor in counters.items()}
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    state = {name: tensor for name, tensor in state.items() if name not in counters}
    save_file(state | narrow, tmp_path / "model.safetensors", {"format": "pt"})

    assert_equal(load_model(tmp_path), theirs("ResNetForImageClassification", tmp_path))
