"""w2v-BERT, and the Conformer layers and positions of its encoder, which the wav2vec 2.0 families have, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lading import check_model, import_cards
from lading.errors import ModelConfigError, NotSupportedError
from lading.families import wav2vec2_asr
from lading.families.w2vbert import FAMILY, W2VBert, W2VBertConfig, get_w2vbert_model_hub
from lading.families.wav2vec2 import Wav2Vec2Config
from lading.families.wav2vec2_asr import Wav2Vec2Asr, Wav2Vec2AsrConfig
from lading.families.wav2vec2_encoder import Wav2Vec2EncoderConfig
from lading.models.construct import build_on_meta
from lading.models.shapes import targets_of_config
from lading.models.targets import targets_of
from lading.planning.rules import rename

ENCODER = Wav2Vec2EncoderConfig(
    model_dim=12,
    max_seq_len=40,
    feature_dim=8,
    use_fbank=True,
    layer_norm_features=False,
    num_fbank_channels=4,
    fbank_stride=2,
    pos_encoder_type="relative",
    use_conformer=True,
    num_encoder_layers=3,
    num_encoder_attn_heads=3,
    ffn_inner_dim=20,
    dropout_p=0.0,
    attn_dropout_p=0.0,
    layer_drop_p=0.0,
    depthwise_conv_kernel_size=5,
)
CONFIG = W2VBertConfig(
    w2v2_config=Wav2Vec2Config(
        encoder_config=ENCODER,
        final_dim=6,
        quantized_dim=4,
        num_codebook_entries=5,
        num_distractors=7,
        temporal_mask_span_len=3,
    ),
    num_bert_encoder_layers=1,
    num_target_codebooks=2,
)
KINDS = [(conformer, positions) for conformer in (False, True) for positions in ("conv", "relative", "rotary")]


def with_encoder(**changes: Any) -> W2VBertConfig:
    return replace(CONFIG, w2v2_config=replace(CONFIG.w2v2_config, encoder_config=replace(ENCODER, **changes)))


def asr(conformer: bool, positions: Any) -> Wav2Vec2AsrConfig:
    encoder = replace(
        ENCODER, use_conformer=conformer, pos_encoder_type=positions, pos_conv_kernel_size=4, num_pos_conv_groups=3
    )

    return Wav2Vec2AsrConfig(encoder_config=encoder, target_vocab_size=5, use_masking=False)


def make() -> W2VBert:
    torch.manual_seed(0)

    return get_w2vbert_model_hub().create_new_model(CONFIG).eval()


def make_asr(config: Wav2Vec2AsrConfig, *, std: float = 0.3) -> Wav2Vec2Asr:
    torch.manual_seed(0)
    model: Wav2Vec2Asr = wav2vec2_asr.get_wav2vec2_asr_model_hub().create_new_model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)

    return model


def banks(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 61, 4)), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_outputs(home: Path) -> None:
    found = make()(banks())

    masked = int(found.w2v2.temporal_mask.sum(1)[0])
    assert found.logits.shape == (2, masked, 5, 2)
    assert found.targets.shape == (2, masked, 2)
    assert found.w2v2.logits.shape == (2, masked, 8)
    assert found.hidden.shape == found.w2v2.hidden.shape == (2, 30, 12)
    assert not torch.equal(found.hidden, found.w2v2.hidden)


@torch.no_grad()
def test_the_loss_of_masked_prediction(home: Path) -> None:
    model = make()
    found = model(banks())

    loss = model.loss(found, bert_weight=0.5, w2v2_weight=2.0)

    chosen = found.logits.log_softmax(2).gather(2, found.targets[:, :, None])
    torch.testing.assert_close(loss.bert, -chosen.sum())
    assert loss.w2v2 == model.w2v2_model.loss(found.w2v2)
    torch.testing.assert_close(loss.aggregate, 0.5 * loss.bert + 2.0 * loss.w2v2.aggregate)
    assert model.loss(found, bert_label_smoothing=0.1).bert != loss.bert


@torch.no_grad()
def test_targets_are_what_the_quantizer_chose(home: Path) -> None:
    model = make()
    found = model(banks())

    entries = model.w2v2_model.quantizer.codevectors.view(2, 5, 2)
    chosen = torch.cat([entries[book][found.targets[..., book]] for book in range(2)], dim=-1)
    torch.testing.assert_close(chosen, found.w2v2.quantizer.vectors)


def test_gradients_reach_everything_in_training(home: Path) -> None:
    model = make().train()

    model.loss(model(banks())).aggregate.backward()

    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert all(model.get_buffer(name).ne(0).all() for name in model.state_dict() if name.endswith("batches_tracked"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(CONFIG, num_bert_encoder_layers=3), "less than the `num_encoder_layers` of 3"),
        (replace(CONFIG, num_bert_encoder_layers=0), "num_bert_encoder_layers"),
        (replace(CONFIG, num_target_codebooks=3), "at most the `num_codebooks` of 2"),
        (with_encoder(layer_drop_p=0.1), "layer_drop_p"),
        (with_encoder(norm_order="PRE"), "norm_order"),
        (
            with_encoder(pos_encoder_type="conv", pos_encoder_depth=0, pos_conv_kernel_size=3, num_pos_conv_groups=1),
            "pos_encoder_depth",
        ),
        (with_encoder(depthwise_conv_kernel_size=0), "depthwise_conv_kernel_size"),
        (with_encoder(max_seq_len=0), "max_seq_len"),
        (with_encoder(model_dim=9), "even `model_dim`"),
        (with_encoder(model_dim=9, pos_encoder_type="rotary"), "even width"),
    ],
)
def test_nonsense(config: W2VBertConfig, message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        build_on_meta(FAMILY, config)
    with pytest.raises(ModelConfigError, match=message):
        targets_of_config(FAMILY, config)


# --- layers and positions


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("conformer", "positions"), KINDS)
def test_shapes(conformer: bool, positions: str, depth: int) -> None:
    family, config = wav2vec2_asr.FAMILY, asr(conformer, positions)
    config.encoder_config.pos_encoder_depth = depth

    assert targets_of_config(family, config) == targets_of(build_on_meta(family, config), dtype=None)


@pytest.mark.parametrize(("conformer", "positions"), KINDS)
@torch.no_grad()
def test_padding_changes_nothing(conformer: bool, positions: str, home: Path) -> None:
    model = make_asr(asr(conformer, positions))
    x = banks()
    mask = (torch.arange(61)[None] < torch.tensor([[61], [38]])).long()

    found = model(x, mask)

    assert found.num_frames.tolist() == [30, 19]
    torch.testing.assert_close(found.logits[1, :19], model(x[1:, :38]).logits[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x, mask).logits, found.logits)
    assert model(x, mask * 0).logits.isfinite().all()


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@torch.no_grad()
def test_positions_matter_and_have_a_limit(positions: str, home: Path) -> None:
    model = make_asr(asr(False, positions), std=1.0)
    x = banks(1, 20, 4)

    turned = model(x.view(1, 10, 2, 4).flip(1).flatten(1, 2)).logits.flip(1)
    assert not torch.allclose(turned, model(x).logits, atol=1e-2)

    assert model(banks(1, 80, 4)).logits.shape == (1, 40, 5)
    with pytest.raises(ValueError, match="at most 40 frames"):
        model(banks(1, 82, 4))


@torch.no_grad()
def test_half_precision(home: Path) -> None:
    config = asr(True, "relative")
    model = make_asr(config)
    half = wav2vec2_asr.get_wav2vec2_asr_model_hub().create_new_model(config, dtype=torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())

    found = half(banks().to(torch.bfloat16)).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), model(banks()).logits, rtol=0.2, atol=0.2)


@torch.no_grad()
def test_new_models(home: Path) -> None:
    state = make().state_dict()

    conv = "w2v2_model.wav2vec2.encoder.layers.0.conv_module"
    assert torch.equal(state[f"{conv}.batch_norm.running_var"], torch.ones(12))
    assert torch.equal(state[f"{conv}.batch_norm.running_mean"], torch.zeros(12))
    assert state[f"{conv}.batch_norm.num_batches_tracked"] == 0
    assert 0.35 < state[f"{conv}.depthwise_conv.weight"].abs().max() <= 5**-0.5
    assert state["w2v2_model.wav2vec2.encoder.layers.0.self_attn.relative.bias.u"].std() > 0.1


# --- checkpoints


def test_rotations_of_fairseq_are_not_taken_for_those_of_fairseq2() -> None:
    config = asr(True, "rotary")
    layer = "w2v_encoder.w2v_model.encoder.layers.0"
    names = [f"{layer}.self_attn.linear_q.weight", f"{layer}.conv_module.depthwise_conv.weight"]

    assert rename(names, wav2vec2_asr.FAMILY.rules(config)) == names


def test_stacked_convolutions_of_fairseq() -> None:
    config = asr(False, "conv")
    names = ["encoder.pos_conv.1.0.weight", "w2v_encoder.w2v_model.encoder.pos_conv.1.0.bias"]

    layer = "wav2vec2.encoder.pos_conv_embed.layers.1.conv"
    assert rename(names, wav2vec2_asr.FAMILY.rules(config)) == [f"{layer}.weight", f"{layer}.bias"]


@pytest.mark.parametrize(
    "changes",
    [
        {"use_conformer": True, "depthwise_conv_kernel_size": 5},
        {"pos_encoder_type": "relative"},
        {"pos_encoder_type": "rotary"},
        {"pos_encoder_depth": 2},
    ],
)
def test_what_config_json_cannot_describe(changes: dict[str, Any]) -> None:
    encoder = Wav2Vec2EncoderConfig(max_seq_len=100, depthwise_conv_kernel_size=3)
    to_hf = wav2vec2_asr.FAMILY.to_hf
    assert to_hf is not None
    assert to_hf(Wav2Vec2AsrConfig(encoder_config=encoder))["model_type"] == "wav2vec2"

    with pytest.raises(NotSupportedError):
        to_hf(Wav2Vec2AsrConfig(encoder_config=replace(encoder, **changes)))


def test_checks_and_loads(tmp_path: Path, home: Path) -> None:
    state = make().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    import_cards(
        [
            {
                "name": "tiny_w2vbert",
                "model_family": "w2vbert",
                "model_arch": "300m",
                "checkpoint": str(tmp_path / "model.safetensors"),
                "model_config": {
                    "w2v2_config": {
                        "encoder_config": {
                            "model_dim": 12,
                            "feature_dim": 8,
                            "num_fbank_channels": 4,
                            "num_encoder_layers": 3,
                            "num_encoder_attn_heads": 3,
                            "ffn_inner_dim": 20,
                            "depthwise_conv_kernel_size": 5,
                        },
                        "final_dim": 6,
                        "quantized_dim": 4,
                        "num_codebooks": 2,
                        "num_codebook_entries": 5,
                    },
                    "num_bert_encoder_layers": 1,
                    "num_target_codebooks": 2,
                },
            },
        ],
    )

    assert check_model("tiny_w2vbert").fits
    loaded = get_w2vbert_model_hub().load_model("tiny_w2vbert", progress=False)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())
