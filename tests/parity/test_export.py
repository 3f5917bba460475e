"""What is exported, loaded by transformers: parameters equal bit for bit, and nothing missing or left over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import Module

from lading import Family, NotSupportedError, convert_checkpoint, export_model, load_model
from lading.families.bert import BertConfig
from lading.families.deepseek import DeepSeekConfig
from lading.families.gemma3 import Gemma3Config
from lading.families.gemma3n import Gemma3nConfig
from lading.families.jepa import JepaConfig, JepaEncoderConfig
from lading.families.llama import LLaMAConfig, LLaMARoPEScaleConfig
from lading.families.llama4 import Llama4Config, Llama4ExpertsConfig
from lading.families.mistral import MistralConfig
from lading.families.mixtral import MixtralConfig
from lading.families.nllb import NllbConfig
from lading.families.olmo import OLMOConfig, YaRNScaleConfig
from lading.families.qwen import QwenConfig
from lading.families.qwen3_moe import Qwen3MoEConfig
from lading.families.s2t_transformer import S2TTransformerConfig
from lading.families.wav2vec2 import Wav2Vec2Config
from lading.families.wav2vec2_asr import Wav2Vec2AsrConfig
from lading.families.wav2vec2_encoder import Wav2Vec2EncoderConfig
from lading.gangs import create_fake_gangs
from lading.models.construct import create_model
from lading.models.family import get_family
from lading.planning.rules import Rule, rename

SIZES: dict[str, Any] = {
    "model_dim": 24, "max_seq_len": 64, "vocab_size": 50, "num_layers": 3, "num_attn_heads": 4,
    "num_key_value_heads": 2, "ffn_inner_dim": 20,
}  # fmt: skip
LLAMA = LLaMAConfig(**SIZES, ffn_inner_dim_multiple_of=8)
LLAMA4 = Llama4Config(
    **SIZES, ffn_inner_dim_multiple_of=8, nope_layer_interval=3, attention_chunk_size=5, attn_temperature_floor=4,
    use_qk_norm=True, experts=Llama4ExpertsConfig(num_experts=4, top_k=2),
)  # fmt: skip
QWEN = QwenConfig(**SIZES)
QWEN3 = replace(QWEN, qkv_proj_bias=False, q_norm=True, k_norm=True)
GEMMA = Gemma3Config(**SIZES, head_dim=6, sliding_window=5, attn_scale_dim=7)
GEMMA_3N = Gemma3nConfig(
    **SIZES | {"num_layers": 4}, altup_hidden_dim=12, head_dim=6, sliding_window=5, num_kv_shared_layers=0,
    laurel_rank=3, vocab_size_per_layer_input=40, hidden_size_per_layer_input=5,
)  # fmt: skip
OLMO = OLMOConfig(**SIZES | {"num_key_value_heads": 4}, pad_idx=1)
SPEECH = Wav2Vec2EncoderConfig(
    model_dim=24, feature_dim=9, feature_extractor_layer_descs=[(7, 10, 5), (9, 3, 2)], pos_conv_kernel_size=4,
    num_pos_conv_groups=3, num_encoder_layers=2, num_encoder_attn_heads=4, ffn_inner_dim=20,
)  # fmt: skip
STACKS: dict[str, Any] = {
    "model_dim": 24, "num_encoder_layers": 2, "num_decoder_layers": 3, "num_encoder_attn_heads": 4,
    "num_decoder_attn_heads": 3, "ffn_inner_dim": 20,
}  # fmt: skip
NLLB = NllbConfig(**STACKS, vocab_size=50, max_seq_len=64, pad_idx=1)
S2T = S2TTransformerConfig(**STACKS, target_vocab_size=50, num_fbank_channels=6, first_source_position=2)
PRE_NORM = replace(
    SPEECH, norm_order="PRE", layer_norm_features=False, feature_extractor_layer_norm_convs=True,
    feature_extractor_bias=True,
)  # fmt: skip
VISION = JepaEncoderConfig(
    model_dim=24, input_dims=(8, 12), patch_dims=(4, 2), num_encoder_layers=2, num_encoder_attn_heads=4,
    ffn_inner_dim_ratio=1.7, learned_positions=True,
)  # fmt: skip

CASES: dict[str, tuple[str, Any]] = {
    "llama": ("llama", LLAMA),
    "llama-3.1": (
        "llama",
        replace(
            LLAMA, tied_embeddings=True, use_scaled_rope=True, rope_theta=5e5, head_dim=10, pad_idx=3,
            rope_scale=LLaMARoPEScaleConfig(factor=4.0, original_context_length=16), qkv_proj_bias=True,
            output_proj_bias=True, ffn_bias=True,
        ),
    ),
    "llama4": ("llama4", LLAMA4),
    "llama4-interleaved": (
        "llama4",
        replace(
            LLAMA4, experts=Llama4ExpertsConfig(num_experts=3, interleave_moe_layer_step=2, inner_dim=12), head_dim=8,
            use_scaled_rope=True, rope_scale=LLaMARoPEScaleConfig(factor=16.0, frequency_factors=(1.0, 1.0)),
            nope_layer_interval=None, pad_idx=3, output_proj_bias=True, qkv_proj_bias=True,
        ),
    ),
    "llama4-without-chunks-and-experts": (
        "llama4",
        replace(
            LLAMA4, experts=Llama4ExpertsConfig(interleave_moe_layer_step=4), attention_chunk_size=0, use_qk_norm=False,
            attn_temperature_tuning=False,
        ),
    ),
    "qwen2": ("qwen", QWEN),
    "qwen2-windows": ("qwen", replace(QWEN, attn_window_len=5, num_full_attn_layers=2, head_dim=8)),
    "qwen2-no-layer-has-the-window": ("qwen", replace(QWEN, attn_window_len=5, num_full_attn_layers=3)),
    "qwen3": ("qwen", replace(QWEN3, tied_embeddings=True)),
    "qwen3-head-dim": ("qwen", replace(QWEN3, head_dim=10)),
    "mistral": ("mistral", MistralConfig(**SIZES)),
    "mistral-without-window": ("mistral", MistralConfig(**SIZES, attn_window_len=None, head_dim=8, pad_idx=2)),
    "deepseek": (
        "deepseek",
        DeepSeekConfig(
            **SIZES | {"num_key_value_heads": 4}, num_dense_layers=1, num_experts=8, num_groups=4, top_k_groups=2,
            top_k=3, expert_inner_dim=16, query_rank=12, key_value_rank=8, head_dim=6, rotary_dim=4, value_dim=10,
            num_shared_experts=2,
        ),
    ),
    "mixtral": ("mixtral", MixtralConfig(**SIZES, num_experts=5, attn_window_len=5, pad_idx=2)),
    "qwen3-moe": (
        "qwen3_moe",
        Qwen3MoEConfig(
            **SIZES, num_experts=4, top_k=2, expert_inner_dim=12, dense_layers=[0], head_dim=8, normalize_scores=False
        ),
    ),
    "olmo2": ("olmo", OLMO),
    "olmo3": ("olmo", replace(OLMO, sliding_window=5, num_key_value_heads=2, rope_theta=77.0)),
    "olmo3-yarn": (
        "olmo",
        replace(OLMO, sliding_window=5, yarn_scale_config=YaRNScaleConfig(scale_factor=4.0, original_max_seq_len=16)),
    ),
    "olmo3-yarn-without-window": (
        "olmo", replace(OLMO, yarn_scale_config=YaRNScaleConfig(scale_factor=4.0, original_max_seq_len=16)),
    ),
    "gemma3": ("gemma3", GEMMA),
    "gemma3-factor": (
        "gemma3",
        replace(
            GEMMA, rope_factor=4.0, rope_theta=99.0, local_rope_theta=9.0, tied_embeddings=False,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
    ),
    "gemma3n": ("gemma3n", GEMMA_3N),
    "gemma3n-widths": (
        "gemma3n",
        replace(
            GEMMA_3N, ffn_inner_dims=[8, 20, 20, 12], activation_sparsity_pattern=[0.5, 0.0, 0.25, 0.0],
            layer_types=["full_attention", *["sliding_attention"] * 3], num_kv_shared_layers=2, rope_theta=9.0,
            rope_theta_global=99.0, final_logit_soft_cap=2.0, tied_embeddings=False,
        ),
    ),
    "bert": (
        "bert",
        BertConfig(model_dim=24, max_seq_len=40, vocab_size=50, num_layers=2, num_attn_heads=4, ffn_inner_dim=20),
    ),
    "nllb": ("nllb", NLLB),
    "s2t": ("s2t_transformer", S2T),
    "s2t-tied": ("s2t_transformer", replace(S2T, tied_embeddings=True)),
    "jepa": ("jepa", JepaConfig(encoder_config=VISION)),
    "jepa-without-biases": ("jepa", JepaConfig(encoder_config=replace(VISION, qkv_bias=False, patch_dims=(4, 4)))),
    "wav2vec2": (
        "wav2vec2", Wav2Vec2Config(encoder_config=SPEECH, final_dim=20, quantized_dim=6, num_codebook_entries=5),
    ),
    "wav2vec2-pre-norm": ("wav2vec2", Wav2Vec2Config(encoder_config=PRE_NORM, quantized_dim=6)),
    "wav2vec2-asr": ("wav2vec2_asr", Wav2Vec2AsrConfig(encoder_config=SPEECH, target_vocab_size=5)),
    "wav2vec2-asr-without-masks": (
        "wav2vec2_asr", Wav2Vec2AsrConfig(encoder_config=PRE_NORM, target_vocab_size=5, use_masking=False),
    ),
}  # fmt: skip


def create(family: Family[Any, Any], config: Any, dtype: torch.dtype = torch.float32) -> Module:
    torch.manual_seed(0)
    model = create_model(family, config, gangs=create_fake_gangs("cpu"), dtype=dtype, meta=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def their_model(folder: Path) -> Module:
    """By the class that the file itself names; all parameters are there, and no others."""
    config = transformers.AutoConfig.from_pretrained(folder)
    (name,) = config.architectures
    model, info = getattr(transformers, name).from_pretrained(
        folder, dtype="auto", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()  # type: ignore[no-any-return]


def same(found: Module, expected: Module, rules: Sequence[Rule] = ()) -> None:
    """``rules`` are for names of modules of transformers that are not those in its files."""
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (found, expected))
    theirs = dict(zip(rename(list(theirs), rules), theirs.values(), strict=True))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name


def outputs(model: Module, family: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        if family == "wav2vec2":
            sound = torch.randn(1, 400, generator=generator)
            speech = model.wav2vec2
            value = speech(sound)
        elif family == "wav2vec2_asr":
            value = model(torch.randn(1, 400, generator=generator))
        elif family in ("nllb", "s2t_transformer"):
            ids = torch.randint(5, 45, (2, 21), generator=generator)
            sources = {"nllb": ids, "s2t_transformer": torch.randn(2, 21, 6, generator=generator)}
            if hasattr(model, "spec"):
                value = model(sources[family], None, ids)
            else:
                value = model(sources[family], decoder_input_ids=ids)
        elif family == "jepa":
            value = model(torch.randn(2, 3, 8, 12, generator=generator))
        else:
            value = model(torch.randint(5, 45, (2, 21), generator=generator))
    for name in ("logits", "last_hidden_state", "hidden"):
        value = getattr(value, name, value)
    assert isinstance(value, Tensor)
    return value


@pytest.mark.few(7)
@pytest.mark.parametrize(("name", "config"), CASES.values(), ids=CASES.keys())
def test_a_configuration_there_and_back(tmp_path: Path, name: str, config: Any) -> None:
    family = get_family(name)
    model = create(family, config)
    report = export_model(model, family, config, tmp_path / "out", shard_size=8000)
    assert len(report.files) > 3

    theirs = their_model(tmp_path / "out")
    same(model, theirs, family.rules(config) if name == "jepa" else ())
    torch.testing.assert_close(outputs(model, name), outputs(theirs, name), rtol=1e-4, atol=1e-4)

    read = family.from_hf(family.to_hf(config))
    if name == "wav2vec2_asr":  # which reads that nothing is masked, but keeps how much was
        read = family.from_hf(family.to_hf(read))
    assert family.from_hf(family.to_hf(read)) == read
    again = load_model(tmp_path / "out", dtype="auto")
    if not getattr(config, "use_masking", False):  # what stands for masked frames is never read from such files
        same(again, model)


@pytest.mark.parametrize(
    ("name", "config", "field"),
    [
        ("llama", replace(LLAMA, qkv_proj_bias=True), "output_proj_bias"),
        ("llama4", replace(LLAMA4, ffn_bias=True), "ffn_bias"),
        ("llama4", replace(LLAMA4, experts=Llama4ExpertsConfig(use_shared_expert=False)), "experts"),
        ("qwen", replace(QWEN, q_norm=True), "q_norm"),
        ("qwen", replace(QWEN3, qkv_proj_bias=True), "qkv_proj_bias"),
        (
            "olmo",
            replace(
                OLMO, sliding_window=5, yarn_scale_config=YaRNScaleConfig(scale_factor=4.0), yarn_in_all_layers=True
            ),
            "window_rope_theta",
        ),
        ("nllb", replace(NLLB, pad_idx=0), "pad_idx"),
        ("s2t_transformer", replace(S2T, first_source_position=0), "first_source_position"),
        ("jepa", JepaConfig(encoder_config=replace(VISION, learned_positions=False)), "learned_positions"),
        ("jepa", JepaConfig(encoder_config=replace(VISION, input_dims=(2, 8, 8), patch_dims=(1, 4, 4))), "images"),
        ("wav2vec2", Wav2Vec2Config(encoder_config=SPEECH, final_proj_bias=False), "final_proj_bias"),
        (
            "wav2vec2_asr",
            Wav2Vec2AsrConfig(encoder_config=replace(SPEECH, use_fbank=True, num_fbank_channels=9, fbank_stride=1)),
            "fbank",
        ),
    ],
)
def test_what_no_file_can_describe(tmp_path: Path, name: str, config: Any, field: str) -> None:
    family = get_family(name)
    with pytest.raises(NotSupportedError, match=field):
        export_model(create(family, config), family, config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def published(folder: Path, model: nn.Module, **options: Any) -> Mapping[str, Tensor]:
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    return dict(model.state_dict())


@pytest.mark.parametrize("dtype", ["auto", torch.float16])
def test_a_published_folder(tmp_path: Path, dtype: Any) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, bos_token_id=7
    )
    state = published(tmp_path / "in", transformers.LlamaForCausalLM(config).bfloat16(), max_shard_size="8KB")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", dtype=dtype, progress=False)

    theirs = their_model(tmp_path / "out")
    wanted = torch.bfloat16 if dtype == "auto" else dtype
    assert theirs.dtype == wanted
    assert theirs.config.bos_token_id == 7
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert all(torch.equal(theirs.state_dict()[name], value.to(wanted)) for name, value in state.items())


def test_masking_without_an_embedding_in_the_written_model(tmp_path: Path) -> None:
    """The checkpoint has the embedding, but a model that writes down speech is loaded without it."""
    config = transformers.Wav2Vec2Config(
        hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, vocab_size=5, conv_dim=(9, 9),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=3, ctc_loss_reduction="mean",
    )  # fmt: skip
    state = published(tmp_path / "in", transformers.Wav2Vec2ForCTC(config))
    assert "wav2vec2.masked_spec_embed" in state
    convert_checkpoint(tmp_path / "in", tmp_path / "out", drop=True, progress=False)

    theirs = their_model(tmp_path / "out")
    assert theirs.config.ctc_loss_reduction == "mean"
    assert set(theirs.state_dict()) == set(state) - {"wav2vec2.masked_spec_embed"}
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())


def test_a_head_that_the_family_does_not_have(tmp_path: Path) -> None:
    """The file then names the class that what was written is of."""
    config = transformers.BertConfig(
        hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    published(tmp_path / "in", transformers.BertForPreTraining(config))
    convert_checkpoint(tmp_path / "in", tmp_path / "out", drop=True, progress=False)

    same(their_model(tmp_path / "out"), load_model(tmp_path / "in"))


@pytest.mark.parametrize(
    ("config", "kls"),
    [
        (
            transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=2),
            transformers.GPT2LMHeadModel,
        ),
        (
            transformers.MixtralConfig(
                hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                vocab_size=50, num_local_experts=3,
            ),
            transformers.MixtralForCausalLM,
        ),
    ],
    ids=["gpt2", "mixtral"],
)  # fmt: skip
def test_a_model_of_transformers_itself(tmp_path: Path, config: Any, kls: type[nn.Module]) -> None:
    state = published(tmp_path / "in", kls(config))
    convert_checkpoint(tmp_path / "in", tmp_path / "out", shard_size=20_000, progress=False)

    theirs = their_model(tmp_path / "out").state_dict()
    assert theirs.keys() == state.keys()
    assert all(torch.equal(theirs[name], value) for name, value in state.items())
