from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import init

from lading.errors import AssetCardError, ModelCheckpointMismatchError, NotSupportedError
from lading.families import wav2vec2, wav2vec2_asr
from lading.families.nn.wav2vec2 import contrastive_logits, draw_distractors
from lading.families.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from lading.families.wav2vec2_asr import Wav2Vec2Asr, Wav2Vec2AsrConfig
from lading.families.wav2vec2_encoder import Wav2Vec2EncoderConfig
from lading.models.family import family_of_model_type, get_family
from lading.models.hf_config import family_of_folder
from lading.planning.rules import route
from tests.helpers.configs import structured

ENCODER = Wav2Vec2EncoderConfig(
    model_dim=12,
    feature_dim=8,
    feature_extractor_layer_descs=[(8, 10, 5), (8, 3, 2)],
    pos_conv_kernel_size=4,
    num_pos_conv_groups=3,
    num_encoder_layers=2,
    num_encoder_attn_heads=3,
    ffn_inner_dim=20,
    dropout_p=0.0,
    attn_dropout_p=0.0,
    layer_drop_p=0.0,
)
LV60K = replace(
    ENCODER,
    layer_norm_features=False,
    feature_extractor_bias=True,
    feature_extractor_layer_norm_convs=True,
    norm_order="PRE",
)
CONFIG = Wav2Vec2Config(
    encoder_config=ENCODER,
    final_dim=6,
    quantized_dim=4,
    num_codebook_entries=5,
    num_distractors=7,
    temporal_mask_span_len=3,
)
ASR_CONFIG = Wav2Vec2AsrConfig(
    encoder_config=ENCODER, target_vocab_size=5, temporal_mask_span_len=3, spatial_mask_span_len=2
)

BASE_960H = {
    "activation_dropout": 0.1,
    "apply_spec_augment": True,
    "architectures": ["Wav2Vec2ForCTC"],
    "attention_dropout": 0.1,
    "bos_token_id": 1,
    "codevector_dim": 256,
    "contrastive_logits_temperature": 0.1,
    "conv_bias": False,
    "conv_dim": [512, 512, 512, 512, 512, 512, 512],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "ctc_loss_reduction": "sum",
    "ctc_zero_infinity": False,
    "diversity_loss_weight": 0.1,
    "do_stable_layer_norm": False,
    "eos_token_id": 2,
    "feat_extract_activation": "gelu",
    "feat_extract_dropout": 0.0,
    "feat_extract_norm": "group",
    "feat_proj_dropout": 0.1,
    "feat_quantizer_dropout": 0.0,
    "final_dropout": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "layerdrop": 0.1,
    "mask_feature_length": 10,
    "mask_feature_prob": 0.0,
    "mask_time_length": 10,
    "mask_time_prob": 0.05,
    "model_type": "wav2vec2",
    "num_attention_heads": 12,
    "num_codevector_groups": 2,
    "num_codevectors_per_group": 320,
    "num_conv_pos_embedding_groups": 16,
    "num_conv_pos_embeddings": 128,
    "num_feat_extract_layers": 7,
    "num_hidden_layers": 12,
    "num_negatives": 100,
    "pad_token_id": 0,
    "proj_codevector_dim": 256,
    "transformers_version": "4.7.0.dev0",
    "vocab_size": 32,
}


def make(config: Wav2Vec2Config = CONFIG) -> Wav2Vec2:
    torch.manual_seed(0)
    model = wav2vec2.FAMILY.build(config)
    for name, parameter in model.named_parameters():
        wav2vec2.FAMILY.init(model, config, name, parameter)

    return model.eval()


def make_asr(config: Wav2Vec2AsrConfig = ASR_CONFIG) -> Wav2Vec2Asr:
    torch.manual_seed(0)
    model = wav2vec2_asr.FAMILY.build(config)
    for name, parameter in model.named_parameters():
        wav2vec2_asr.FAMILY.init(model, config, name, parameter)

    return model.eval()


def sound(n: int = 2, length: int = 303) -> torch.Tensor:
    return torch.randn(n, length, generator=torch.Generator().manual_seed(1))


def test_they_are_registered() -> None:
    assert get_family("wav2vec2") is wav2vec2.FAMILY
    assert get_family("wav2vec2_asr") is wav2vec2_asr.FAMILY


@pytest.mark.parametrize(
    ("architectures", "name"),
    [
        (["Wav2Vec2ForPreTraining"], "wav2vec2"),
        (["Wav2Vec2ForCTC"], "wav2vec2_asr"),
        (["Wav2Vec2ForSequenceClassification"], "hg"),
        ([], "hg"),
    ],
)
def test_two_families_share_a_model_type(architectures: list[str], name: str) -> None:
    assert getattr(family_of_model_type("wav2vec2", architectures), "name", None) == name
    assert getattr(family_of_model_type("qwen3", architectures), "name", None) == "qwen"


# --- models


@torch.no_grad()
def test_pre_training() -> None:
    model = make().train()

    found = model(sound())

    masked = int(found.temporal_mask.sum(1)[0])
    assert found.temporal_mask.sum(1).tolist() == [masked] * 2
    assert found.logits.shape == (2, masked, 8)
    assert found.states.shape == found.targets.shape == (2, masked, 6)
    assert found.quantizer.vectors.shape == (2, masked, 4)
    assert found.hidden.shape == (2, 29, 12)
    assert found.raw_features.shape == (2, 29, 8)
    assert found.num_frames.tolist() == [29, 29]
    assert model.quantizer.num_updates == 1


def test_gradients_reach_everything_in_training() -> None:
    config = replace(CONFIG, encoder_config=replace(ENCODER, feature_grad_scale=0.1))
    model = make(config).train()

    found = model(sound())
    (found.logits[found.logits.isfinite()].sum() + found.quantizer.prob_perplexity).backward()

    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("flows", [True, False])
def test_the_frontend_may_learn_through_the_quantizer(flows: bool) -> None:
    model = make(replace(CONFIG, quantizer_encoder_grad=flows)).train()

    model(sound()).targets.square().sum().backward()

    grad = model.wav2vec2.feature_extractor.conv_layers[0].conv.weight.grad
    assert (grad is not None and bool(grad.any())) == flows


@torch.no_grad()
def test_training_is_repeatable_by_torchs_generator() -> None:
    model = make().train()

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(sound()).logits

    assert torch.equal(run(3), run(3))
    assert run(3).shape != run(4).shape or not torch.equal(run(3), run(4))


@torch.no_grad()
def test_distractors_are_others() -> None:
    found = draw_distractors(torch.zeros(2, 5, 3), 400)

    assert found.shape == (2, 5, 400)
    for i in range(5):
        assert set(found[:, i].flatten().tolist()) == set(range(5)) - {i}


@torch.no_grad()
def test_the_right_candidate_is_the_first_and_its_equals_are_out() -> None:
    targets = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    states = torch.tensor([[[2.0, 0.0], [3.0, 4.0], [0.0, 1.0]]])
    distractors = torch.tensor([[[1, 2], [0, 2], [0, 1]]])

    found = contrastive_logits(states, targets, distractors, temperature=0.5)

    inf = float("inf")
    torch.testing.assert_close(found, torch.tensor([[[2, 0, -inf], [1.6, 1.2, 1.2], [0, -inf, 2]]]))


@pytest.mark.parametrize("counts", [(3, 4), (1, 1), (0, 0)])
def test_masks_that_make_no_task(counts: tuple[int, int]) -> None:
    mask = torch.arange(29)[None] < torch.tensor(counts)[:, None]

    with pytest.raises(ValueError, match=f"{counts[0]}, {counts[1]}"):
        make()(sound(), temporal_mask=mask)


@torch.no_grad()
def test_symbols() -> None:
    model = make_asr()

    found = model(sound(), torch.tensor([[1] * 303, [1] * 200 + [0] * 103]))

    assert found.logits.shape == (2, 29, 5)
    assert found.num_frames.tolist() == [29, 19]


def test_symbols_can_be_trained() -> None:
    model = make_asr().train()

    found = model(sound())
    loss = torch.nn.functional.ctc_loss(
        found.logits.log_softmax(-1).transpose(0, 1),
        torch.tensor([[1, 2, 3], [4, 1, 2]]),
        found.num_frames,
        torch.tensor([3, 3]),
    )
    loss.backward()

    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_masking_is_a_matter_of_training() -> None:
    model = make_asr()
    without = make_asr(replace(ASR_CONFIG, use_masking=False))
    without.load_state_dict({k: v for k, v in model.state_dict().items() if "masked_spec_embed" not in k})

    expected = model(sound()).logits
    assert torch.equal(without(sound()).logits, expected)
    assert torch.equal(without.train()(sound()).logits, expected)
    assert not torch.equal(model.train()(sound()).logits, expected)


@torch.no_grad()
def test_dropout_before_the_projection() -> None:
    model = make_asr(replace(ASR_CONFIG, use_masking=False, final_dropout_p=0.5)).train()

    assert not torch.equal(model(sound()).logits, model(sound()).logits)


@pytest.mark.parametrize("encoder", [ENCODER, LV60K], ids=["base", "lv60k"])
def test_random_weights(encoder: Wav2Vec2EncoderConfig) -> None:
    encoder = replace(encoder, model_dim=240, ffn_inner_dim=400, feature_dim=200)
    encoder.feature_extractor_layer_descs = [(200, 10, 5), (200, 3, 2)]
    config = replace(CONFIG, encoder_config=encoder, final_dim=100, quantized_dim=160, num_codebook_entries=50)
    asr = replace(ASR_CONFIG, encoder_config=encoder, target_vocab_size=150)
    expected = {
        "project_hid.weight": (1 / 3 / 240) ** 0.5,
        "project_q.weight": (1 / 3 / 160) ** 0.5,
        "quantizer.weight_proj.weight": 1.0,
        "quantizer.codevectors": (1 / 12) ** 0.5,
        "lm_head.weight": (2 / (240 + 150)) ** 0.5,
        "wav2vec2.masked_spec_embed": (1 / 12) ** 0.5,
        "wav2vec2.feature_projection.projection.weight": (1 / 3 / 200) ** 0.5,
        "wav2vec2.feature_extractor.conv_layers.0.conv.weight": (2 / 10) ** 0.5,
        "wav2vec2.feature_extractor.conv_layers.1.conv.weight": (2 / 600) ** 0.5,
        "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1": (4 / 4 / 240) ** 0.5,
    }
    uniform = ("projection.bias", "conv.bias", "project_hid.bias", "project_q.bias")

    torch.manual_seed(0)
    for model, init_model, values in (
        (wav2vec2.FAMILY.build(config), wav2vec2.FAMILY.init, config),
        (wav2vec2_asr.FAMILY.build(asr), wav2vec2_asr.FAMILY.init, asr),
    ):
        for name, parameter in model.named_parameters():
            init.constant_(parameter, torch.nan)
            init_model(model, values, name, parameter)

        for name, parameter in model.named_parameters():
            if name.endswith(uniform) and "pos_conv" not in name:
                assert 0 < float(parameter.detach().abs().max()) < 0.4, name
            elif name.endswith("bias"):
                assert (parameter == 0).all(), name
            elif "layer_norm" in name:
                assert (parameter == 1).all(), name
            elif name.endswith("original0"):
                direction = model.wav2vec2.encoder.pos_conv_embed.conv.parametrizations["weight"]
                torch.testing.assert_close(direction(), direction.original1, rtol=0.1, atol=0.0)
            else:
                assert float(parameter.detach().std()) == pytest.approx(expected.get(name, 0.02), rel=0.15), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_fbank": True, "num_fbank_channels": 4, "fbank_stride": 2, "sample_fbank_every_k": 2}, "every_k"),
    ],
)
def test_variants_that_are_not_supported(changes: dict[str, Any], message: str) -> None:
    encoder = replace(ENCODER, **changes)

    with pytest.raises(NotSupportedError, match=message):
        wav2vec2.FAMILY.build(replace(CONFIG, encoder_config=encoder))
    with pytest.raises(NotSupportedError, match=message):
        wav2vec2_asr.FAMILY.build(replace(ASR_CONFIG, encoder_config=encoder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(CONFIG, max_temporal_mask_prob=0.0), "max_temporal_mask_prob"),
        (replace(CONFIG, encoder_config=replace(ENCODER, use_fbank=True)), "num_fbank_channels"),
        (replace(ASR_CONFIG, target_vocab_size=0), "target_vocab_size"),
        (replace(ASR_CONFIG, final_dropout_p=1.0), "final_dropout_p"),
    ],
)
def test_nonsense(config: Any, message: str) -> None:
    family = wav2vec2.FAMILY if isinstance(config, Wav2Vec2Config) else wav2vec2_asr.FAMILY

    with pytest.raises(ValueError, match=message):
        family.build(config)


# --- configurations


def test_overrides_reach_the_encoder() -> None:
    config = structured(Wav2Vec2Config, {"encoder_config": {"norm_order": "PRE", "model_dim": 4}})

    assert (config.encoder_config.norm_order, config.encoder_config.model_dim) == ("PRE", 4)
    with pytest.raises(AssetCardError, match=r"encoder_config\.norm_order.*'POST' or 'PRE'"):
        structured(Wav2Vec2Config, {"encoder_config": {"norm_order": "pre"}})
    with pytest.raises(AssetCardError, match="model_dim"):
        structured(Wav2Vec2Config, {"encoder_config": {"modell_dim": 4}})


def test_a_published_file() -> None:
    config = wav2vec2_asr.FAMILY.from_hf(BASE_960H)

    assert config == Wav2Vec2AsrConfig(
        encoder_config=Wav2Vec2EncoderConfig(
            first_pass_dropout_p=0.1,
            feature_grad_scale=1.0,
            ffn_inner_dropout_p=0.1,
            layer_drop_p=0.1,
            feature_projection=True,
        ),
        final_dropout_p=0.1,
        use_masking=False,
        max_temporal_mask_prob=0.05,
        spatial_mask_span_len=10,
        max_spatial_mask_prob=0.0,
        min_num_spatial_mask_spans=0,
    )


@pytest.mark.parametrize("family", [wav2vec2.FAMILY, wav2vec2_asr.FAMILY], ids=["wav2vec2", "wav2vec2_asr"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_adapter": True}, "add_adapter is True"),
        ({"adapter_attn_dim": 16}, "adapter_attn_dim is 16"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"feat_extract_activation": "relu"}, "feat_extract_activation is 'relu'"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm is 'batch'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method is 'awq'"),
    ],
)
def test_what_would_change_the_result_is_refused(family: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NotSupportedError, match=message):
        family.from_hf(BASE_960H | changes)


def test_pre_training_without_masks_is_refused() -> None:
    with pytest.raises(NotSupportedError, match="apply_spec_augment is False"):
        wav2vec2.FAMILY.from_hf(BASE_960H | {"apply_spec_augment": False})
    with pytest.raises(ModelCheckpointMismatchError, match="max_temporal_mask_prob"):
        wav2vec2.FAMILY.from_hf(BASE_960H | {"mask_time_prob": 0.0})


@pytest.mark.parametrize("family", [wav2vec2.FAMILY, wav2vec2_asr.FAMILY], ids=["wav2vec2", "wav2vec2_asr"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_dim": 512}, "conv_dim is expected to be a list of positive integers, but is 512"),
        ({"conv_kernel": [0] * 7}, "conv_kernel is expected to be a list of positive integers"),
        ({"conv_stride": [True] * 7}, "conv_stride is expected to be a list of positive integers"),
        ({"conv_dim": [512] * 6}, r"conv_dim is expected to be as many numbers as conv_kernel \(7\)"),
        ({"num_attention_heads": 7}, "multiple of `num_attn_heads`"),
        ({"hidden_size": "768"}, "hidden_size is expected to be a positive integer"),
        ({"layerdrop": 1.0}, "layer_drop_p"),
    ],
)
def test_nonsense_in_a_file(family: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelCheckpointMismatchError, match=message):
        family.from_hf(BASE_960H | changes)


# --- names of checkpoints


def routed(family: Any, config: Any, names: list[str]) -> Any:
    return route(names, list(family.build(config).state_dict()), family.rules(config))


def fairseq_encoder(names: list[str]) -> list[str]:
    """Names here → those of fairseq, without the prefix of fine-tuned models."""
    changes = {
        "wav2vec2.": "",
        "masked_spec_embed": "mask_emb",
        "feature_projection.layer_norm.": "layer_norm.",
        "feature_projection.projection.": "post_extract_proj.",
        ".pos_conv_embed.conv.parametrizations.weight.original0": ".pos_conv.0.weight_g",
        ".pos_conv_embed.conv.parametrizations.weight.original1": ".pos_conv.0.weight_v",
        ".pos_conv_embed.conv.": ".pos_conv.0.",
        ".conv.": ".0.",
        ".attention.": ".self_attn.",
        "feed_forward.intermediate_dense.": "fc1.",
        "feed_forward.output_dense.": "fc2.",
    }
    found = []
    for name in names:
        conv = name.startswith("wav2vec2.feature_extractor")
        if ".encoder.layers." in name:
            name = name.replace(".layer_norm.", ".self_attn_layer_norm.")
        for ours, theirs in changes.items():
            name = name.replace(ours, theirs)
        found.append(name.replace(".layer_norm.", ".2.") if conv else name)

    return found


@pytest.mark.parametrize("encoder", [ENCODER, LV60K], ids=["base", "lv60k"])
def test_fairseq_before_fine_tuning(encoder: Wav2Vec2EncoderConfig) -> None:
    config = replace(CONFIG, encoder_config=encoder)
    targets = list(make(config).state_dict())
    heads = {"quantizer.codevectors": "quantizer.vars", "project_hid.": "final_proj."}
    names = fairseq_encoder(targets)
    for ours, theirs in heads.items():
        names = [name.replace(ours, theirs) for name in names]
    if encoder is LV60K:
        names = [name.replace(".2.", ".2.1.") for name in names]

    found = routed(wav2vec2.FAMILY, config, names)

    assert (found.missing, found.unexpected, found.clashes) == ((), (), ())
    assert list(found.tensors) == list(range(len(targets)))


@pytest.mark.parametrize("masked", [True, False])
def test_fairseq_after_fine_tuning(masked: bool) -> None:
    full = list(make_asr().state_dict())
    names = [f"w2v_encoder.w2v_model.{name}" for name in fairseq_encoder(full) if "lm_head" not in name]
    names += ["w2v_encoder.proj.weight", "w2v_encoder.proj.bias"]
    rest = ["w2v_encoder.w2v_model.quantizer.vars", "w2v_encoder.w2v_model.project_q.weight"]

    found = routed(wav2vec2_asr.FAMILY, replace(ASR_CONFIG, use_masking=masked), [*names, *rest])

    assert (found.missing, found.unexpected, found.clashes) == ((), (), ())
    assert len(found.targets) == len(full) - (not masked)


@pytest.mark.parametrize("family", [wav2vec2.FAMILY, wav2vec2_asr.FAMILY], ids=["wav2vec2", "wav2vec2_asr"])
def test_older_names_of_hugging_face(family: Any) -> None:
    config = CONFIG if family is wav2vec2.FAMILY else ASR_CONFIG
    targets = list(family.build(config).state_dict())
    names = [
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        )
        for name in targets
    ]
    assert names != targets

    found = routed(family, config, names)

    assert (found.missing, found.unexpected, found.clashes) == ((), (), ())
    assert list(found.tensors) == list(range(len(targets)))


def test_a_mask_that_is_not_wanted() -> None:
    config = replace(ASR_CONFIG, use_masking=False)

    found = routed(wav2vec2_asr.FAMILY, config, list(make_asr().state_dict()))

    assert (found.missing, found.unexpected) == ((), ())


def test_new_models(home: Path) -> None:
    hub = wav2vec2_asr.get_wav2vec2_asr_model_hub()

    model = hub.create_new_model(ASR_CONFIG, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(sound().to(torch.bfloat16)).logits.isfinite().all()
    assert all(parameter.is_meta for parameter in hub.create_new_model(ASR_CONFIG, meta=True).parameters())
    assert hub.get_model_config("wav2vec2_asr_base_10h") == Wav2Vec2AsrConfig()


def test_a_folder_of_another_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE_960H | {"architectures": ["Wav2Vec2ForXVector"]}))

    assert family_of_folder(tmp_path)[0].name == "hg"  # transformers has it

    (tmp_path / "config.json").write_text(json.dumps(BASE_960H))
    assert family_of_folder(tmp_path) == (wav2vec2_asr.FAMILY, wav2vec2_asr.FAMILY.from_hf(BASE_960H))
