from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lading.families.nn.masking import Masking
from lading.families.nn.speech import SpeechModel, init_speech
from lading.families.nn.speech_encoder import WeightNormConv1d
from lading.families.nn.speech_frontend import ConvolutionalFeatures, FilterBankFeatures
from lading.families.nn.speech_spec import SpeechSpec

SPEC = SpeechSpec(
    model_dim=12,
    feature_dim=8,
    fbank=None,
    feature_extractor_layer_descs=[(8, 10, 5), (8, 3, 2)],
    feature_extractor_bias=False,
    feature_extractor_layer_norm_convs=False,
    feature_grad_scale=1.0,
    project_features=True,
    pos_conv_kernel_size=4,
    num_pos_conv_groups=3,
    num_layers=2,
    num_attn_heads=3,
    ffn_inner_dim=20,
    norm_first=False,
    layer_norm_features=True,
    norm_eps=1e-5,
    first_pass_dropout_p=0.0,
    dropout_p=0.0,
    attn_dropout_p=0.0,
    ffn_inner_dropout_p=0.0,
    layer_drop_p=0.0,
    masked=True,
)
LV60K = replace(
    SPEC,
    feature_extractor_bias=True,
    feature_extractor_layer_norm_convs=True,
    norm_first=True,
    layer_norm_features=False,
)
FBANK = replace(SPEC, fbank=(4, 2))
MASKING = Masking(
    temporal_mask_span_len=3,
    max_temporal_mask_prob=0.5,
    min_num_temporal_mask_spans=1,
    spatial_mask_span_len=2,
    max_spatial_mask_prob=0.5,
    min_num_spatial_mask_spans=1,
)


def make(spec: SpeechSpec = SPEC) -> SpeechModel:
    torch.manual_seed(0)
    model = SpeechModel(spec)
    for name, parameter in model.named_parameters():
        init_speech(model, name, parameter, std=0.3)

    return model.eval()


def sound(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 203)), generator=torch.Generator().manual_seed(1))


# --- frames


@pytest.mark.parametrize("length", [20, 24, 25, 26, 203])
def test_numbers_of_frames(length: int) -> None:
    features = make().feature_extractor

    assert features(sound(1, length)).size(1) == int(features.num_frames(torch.tensor(length)))


def test_what_is_too_short_has_no_frames() -> None:
    assert make().feature_extractor.num_frames(torch.tensor([0, 1, 9, 10, 19, 20])).tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("layer_norm", [False, True])
@torch.no_grad()
def test_norms_between_convolutions_are_taken_in_float32(layer_norm: bool) -> None:
    model = make(replace(SPEC, feature_extractor_layer_norm_convs=layer_norm)).to(torch.bfloat16)
    x = sound().to(torch.bfloat16) * 100

    found = model.feature_extractor(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.float(), copy.deepcopy(model).float().feature_extractor(x.float()), rtol=0.1, atol=0.1
    )


def test_the_gradient_of_convolutions_is_scaled_in_training() -> None:
    spec = replace(LV60K, feature_dim=4, feature_extractor_layer_descs=[(4, 5, 2)])
    full, scaled = (ConvolutionalFeatures(replace(spec, feature_grad_scale=s)) for s in (1.0, 0.1))
    for parameter in full.parameters():
        nn.init.normal_(parameter)
    scaled.load_state_dict(full.state_dict())

    def grads(module: nn.Module) -> list[torch.Tensor]:
        module.zero_grad()
        module(sound(1, 50)).square().sum().backward()
        return [parameter.grad for parameter in module.parameters()]

    assert torch.equal(full(sound(1, 50)), scaled(sound(1, 50)))
    torch.testing.assert_close(grads(scaled), [0.1 * grad for grad in grads(full)])
    torch.testing.assert_close(grads(scaled.eval()), grads(full))


def test_filter_banks_are_taken_together() -> None:
    features = FilterBankFeatures(3, stride=2)
    x = torch.arange(15.0).view(1, 5, 3)

    assert torch.equal(features(x), torch.arange(12.0).view(1, 2, 6))
    assert features.num_frames(torch.tensor([0, 1, 4, 5])).tolist() == [0, 0, 2, 2]


@torch.no_grad()
def test_a_model_of_filter_banks() -> None:
    found = make(FBANK)(sound(2, 31, 4))

    assert found.hidden.shape == (2, 15, 12)
    assert found.num_frames.tolist() == [15, 15]


# --- positions


@pytest.mark.parametrize("kernel_size", [1, 4, 5])
@torch.no_grad()
def test_weight_norm_is_torchs(kernel_size: int) -> None:
    theirs = nn.Conv1d(12, 12, kernel_size, padding=kernel_size // 2, groups=3)
    theirs = nn.utils.parametrizations.weight_norm(theirs, dim=2)
    theirs.parametrizations.weight.original0.mul_(1.7)
    ours = WeightNormConv1d(12, kernel_size, groups=3)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())

    x = sound(2, 12, 9)
    torch.testing.assert_close(ours(x), theirs(x)[:, :, :9])


def test_models_pickle_and_copy() -> None:
    model = make()
    expected = model(sound()).hidden

    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(copied(sound()).hidden, expected)


# --- the encoder


@pytest.mark.parametrize("spec", [LV60K, FBANK], ids=["waveform", "fbank"])
@torch.no_grad()
def test_padding_changes_nothing(spec: SpeechSpec) -> None:
    """With a layer normalization; a group normalization is over time, padding included."""
    model = make(spec)
    x = sound(2, 203) if spec.fbank is None else sound(2, 203, 4)
    mask = torch.ones(2, 203).long()
    padded = torch.cat((x, torch.full_like(x[:, :50], 3.0)), dim=1)
    longer = torch.cat((mask, torch.zeros(2, 50).long()), dim=1)

    found, expected = model(padded, longer), model(x)

    n = int(expected.num_frames[0])
    assert torch.equal(found.num_frames, expected.num_frames)
    assert found.hidden.size(1) > n
    torch.testing.assert_close(found.hidden[:, :n], expected.hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x, mask).hidden, expected.hidden, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_row_of_padding_alone_is_finite() -> None:
    found = make()(sound(), torch.tensor([[1] * 203, [0] * 203]))

    assert found.num_frames.tolist() == [19, 0]
    assert found.hidden.isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_first": True},
        {"norm_first": True, "layer_norm_features": False},
        {"layer_norm_features": False},
        {"project_features": False, "model_dim": 8, "num_attn_heads": 2, "num_pos_conv_groups": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_parameter_matters(changes: dict[str, Any]) -> None:
    model = make(replace(SPEC, **changes))
    expected = model(sound(), temporal_mask=torch.eye(19, dtype=torch.bool)[:2]).hidden

    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):
            continue  # it adds the same to all scores of a query, which softmax doesn't see
        before = parameter.clone()
        parameter.add_(torch.randn_like(parameter))
        assert not torch.equal(model(sound(), temporal_mask=torch.eye(19, dtype=torch.bool)[:2]).hidden, expected), name
        parameter.copy_(before)


@pytest.mark.parametrize("field", ["first_pass_dropout_p", "dropout_p", "attn_dropout_p", "ffn_inner_dropout_p"])
@torch.no_grad()
def test_dropout_is_a_matter_of_training(field: str) -> None:
    model = make(replace(SPEC, **{field: 0.5}))

    assert torch.equal(model(sound()).hidden, model(sound()).hidden)
    model.train()
    assert not torch.equal(model(sound()).hidden, model(sound()).hidden)


def test_layers_are_dropped_in_training() -> None:
    model = make(replace(SPEC, layer_drop_p=0.5)).train()
    without = make().train()
    without.load_state_dict(model.state_dict())
    full = without(sound()).hidden
    seen = set()

    for seed in range(16):
        torch.manual_seed(seed)
        model.zero_grad()
        hidden = model(sound()).hidden
        hidden.square().sum().backward()

        # A layer that was left out has gradients, but they are zero.
        kept = tuple(bool(layer.feed_forward.output_dense.weight.grad.any()) for layer in model.encoder.layers)
        assert torch.equal(hidden, full) == all(kept)
        seen.add(kept)

    assert len(seen) == 4
    assert torch.equal(model.eval()(sound()).hidden, full)


# --- masks


@torch.no_grad()
def test_masked_frames_are_not_seen() -> None:
    model = make(LV60K)
    mask = torch.zeros(2, 19, dtype=torch.bool)
    mask[:, :3] = True
    x, changed = sound(), sound()
    changed[:, :25] = 0.0  # the first three frames, and no other

    assert torch.equal(model(x, temporal_mask=mask).hidden, model(changed, temporal_mask=mask).hidden)
    assert not torch.equal(model(x).hidden, model(changed).hidden)
    assert not torch.equal(model(x).features, model(changed).features)


@torch.no_grad()
def test_drawn_masks() -> None:
    model = make()

    found = model(sound(), masking=MASKING)
    assert found.temporal_mask is not None
    assert found.temporal_mask.any()
    assert not torch.equal(found.hidden, model(sound()).hidden)
    assert not torch.equal(found.hidden, model(sound(), temporal_mask=found.temporal_mask).hidden)  # features, too
    only = replace(MASKING, max_spatial_mask_prob=0.0)
    torch.manual_seed(3)
    found = model(sound(), masking=only)
    assert torch.equal(found.hidden, model(sound(), temporal_mask=found.temporal_mask).hidden)
    assert model(sound()).temporal_mask is None


# --- what does not fit


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (SPEC, (2, 203, 1), r"a waveform \(N, S\)"),
        (SPEC, (2, 19), "too short.*19"),
        (FBANK, (2, 203), r"filter banks \(N, S, 4\)"),
        (FBANK, (2, 203, 5), r"filter banks \(N, S, 4\).*5"),
        (FBANK, (2, 1, 4), "too short.*1"),
    ],
)
def test_inputs_of_another_shape(spec: SpeechSpec, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(spec)(sound(*shape))


def test_masks_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"`attention_mask`.*\(2, 203\).*\(2, 204\)"):
        make()(sound(), torch.ones(2, 204))
    with pytest.raises(ValueError, match=r"`temporal_mask`.*\(2, 19\).*\(2, 20\)"):
        make()(sound(), temporal_mask=torch.ones(2, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match="without the embedding"):
        make(replace(SPEC, masked=False))(sound(), temporal_mask=torch.ones(2, 19, dtype=torch.bool))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_dim": 0}, "`model_dim` must be positive"),
        ({"num_attn_heads": 5}, "multiple of `num_attn_heads`"),
        ({"num_pos_conv_groups": 5}, "multiple of `num_pos_conv_groups`"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"layer_drop_p": 1.0}, "layer_drop_p"),
        ({"dropout_p": -0.1}, "dropout_p"),
        ({"feature_grad_scale": 0.0}, "feature_grad_scale"),
        ({"project_features": False}, "must be projected"),
        ({"feature_extractor_layer_descs": []}, "at least one"),
        ({"feature_extractor_layer_descs": [(8, 0, 1)]}, "positive dimensions"),
        ({"feature_dim": 9}, "the 8 that the last convolution gives"),
        ({"fbank": (3, 2)}, "the 6 that the filter banks give"),
    ],
)
def test_nonsense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **changes)
