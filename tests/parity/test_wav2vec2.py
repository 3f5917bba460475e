"""wav2vec 2.0 against transformers: the same random weights must give the same outputs.

The relative difference of two tensors is ``max |a - b| / max |b|`` over all of their elements.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.parity_tools import randomise, relative_difference

TOLERANCE = 1e-5

BASE: dict[str, Any] = {"feat_extract_norm": "group", "do_stable_layer_norm": False}
LV60K: dict[str, Any] = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}

CASES: dict[str, dict[str, Any]] = {
    "base": BASE,
    "lv60k": LV60K,
    "layer-norm-convs-and-post": BASE | {"feat_extract_norm": "layer"},
    "group-norm-convs-and-pre": BASE | {"do_stable_layer_norm": True},
    "odd-kernel": BASE | {"num_conv_pos_embeddings": 7},
    "one-head-and-eps": LV60K | {"num_attention_heads": 1, "layer_norm_eps": 1e-3},
    "as-wide-as-its-frames": BASE | {"conv_dim": [24, 24, 48]},
}

by_case = pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())


def their_config(config: dict[str, Any]) -> Any:
    from transformers import Wav2Vec2Config

    return Wav2Vec2Config(
        **{
            "vocab_size": 11,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "conv_dim": [24, 24, 32],
            "conv_kernel": [10, 3, 2],
            "conv_stride": [5, 2, 2],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "codevector_dim": 24,
            "num_codevectors_per_group": 7,
            "num_codevector_groups": 3,
            "proj_codevector_dim": 20,
            "num_negatives": 6,
            **config,
        }
    )


def pair(name: str, config: dict[str, Any]) -> tuple[Any, Any]:
    """This project's model and that of transformers, with the same weights."""
    import transformers

    from lading.models.family import family_of_model_type

    torch.manual_seed(len(config))
    theirs_config = their_config(config)
    theirs = getattr(transformers, name)._from_config(theirs_config, attn_implementation="eager").eval()
    randomise(theirs, gain=1.5)

    family = family_of_model_type("wav2vec2", [name])
    assert family is not None
    ours = family.build(family.from_hf(json.loads(theirs_config.to_json_string(use_diff=False)))).eval()
    state = theirs.state_dict()
    if name == "Wav2Vec2ForCTC":
        del state["wav2vec2.masked_spec_embed"]  # masking is left off
    assert list(ours.state_dict()) == list(state)
    ours.load_state_dict(state)

    return ours, theirs


def sound(n: int = 3, length: int = 523) -> Tensor:
    return torch.randn(n, length, generator=torch.Generator().manual_seed(7))


def padding(*lengths: int) -> Tensor:
    return (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()


@by_case
@torch.no_grad()
def test_logits_of_symbols(config: dict[str, Any]) -> None:
    ours, theirs = pair("Wav2Vec2ForCTC", config)

    found = ours(sound())
    expected = theirs(sound()).logits

    assert found.num_frames.tolist() == [expected.size(1)] * 3
    assert relative_difference(found.logits, expected) <= TOLERANCE


@by_case
@torch.no_grad()
def test_padding(config: dict[str, Any]) -> None:
    ours, theirs = pair("Wav2Vec2ForCTC", config)
    mask = padding(523, 301, 40)
    x = sound() * mask

    found = ours(x, mask)
    expected = theirs(x, attention_mask=mask).logits

    assert found.num_frames.tolist() == theirs._get_feat_extract_output_lengths(mask.sum(1)).tolist()
    for i, n in enumerate(found.num_frames.tolist()):
        assert relative_difference(found.logits[i, :n], expected[i, :n]) <= TOLERANCE


@by_case
@torch.no_grad()
def test_pre_training(config: dict[str, Any]) -> None:
    from transformers.models.wav2vec2.modeling_wav2vec2 import _sample_negative_indices

    ours, theirs = pair("Wav2Vec2ForPreTraining", config)
    mask = padding(523, 301, 200)
    x = sound() * mask

    frames = ours.wav2vec2.feature_extractor.num_frames(mask.sum(1))
    length = int(frames.max())
    masked = torch.zeros(3, length, dtype=torch.bool)
    masked[0, [2, 3, 4, 17, 20]] = masked[1, [0, 1, 2, 8, 9]] = masked[2, [1, 4, 5, 6, 7]] = True
    negatives = torch.from_numpy(_sample_negative_indices((3, length), 6, masked.numpy())).long()

    # Theirs count frames over the batch, ours masked frames of a row.
    place = masked.cumsum(1) - 1
    distractors = place.flatten()[negatives][masked].view(3, 5, 6)

    found = ours(x, mask, temporal_mask=masked, distractors=distractors)
    expected = theirs(x, attention_mask=mask, mask_time_indices=masked, sampled_negative_indices=negatives)
    hidden = theirs.wav2vec2(x, attention_mask=mask, mask_time_indices=masked).last_hidden_state

    assert relative_difference(found.states, expected.projected_states[masked].view(3, 5, 20)) <= TOLERANCE
    assert relative_difference(found.targets, expected.projected_quantized_states[masked].view(3, 5, 20)) <= TOLERANCE
    assert relative_difference(found.quantizer.code_perplexity, expected.codevector_perplexity) <= TOLERANCE
    for i, n in enumerate(frames.tolist()):
        assert relative_difference(found.hidden[i, :n], hidden[i, :n]) <= TOLERANCE

    right = expected.projected_quantized_states
    logits = theirs.compute_contrastive_logits(
        right[None],
        right.view(-1, 20)[negatives.view(-1)].view(3, length, -1, 20).permute(2, 0, 1, 3),
        expected.projected_states,
        theirs.config.contrastive_logits_temperature,
    )
    logits = logits.permute(1, 2, 0)[masked].view(3, 5, 7)
    finite = found.logits.isfinite()
    assert relative_difference(found.logits[finite], logits[finite]) <= TOLERANCE
    # Where a distractor happens to be the target, theirs are replaced on the way to the loss.
    # Their diversity is that of probabilities in training only, and of the likeliest entries here.
    assert relative_difference(ours.loss(found).contrastive, expected.contrastive_loss) <= TOLERANCE


@by_case
def test_gradients(config: dict[str, Any]) -> None:
    ours, theirs = pair("Wav2Vec2ForCTC", config)
    mask = padding(523, 301, 200)
    real = ours.wav2vec2.feature_extractor.num_frames(mask.sum(1))[:, None] > torch.arange(25)[None]
    x = sound() * mask

    ours(x, mask).logits[real].square().mean().backward()
    theirs(x, attention_mask=mask).logits[real].square().mean().backward()

    expected = dict(theirs.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in expected.values() if p.grad is not None)
    for name, parameter in ours.named_parameters():
        assert float((parameter.grad - expected[name].grad).abs().max()) <= 10 * TOLERANCE * largest, name


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["Wav2Vec2ForCTC", "Wav2Vec2ForPreTraining"])
@pytest.mark.parametrize("config", [BASE, LV60K], ids=["base", "lv60k"])
@torch.no_grad()
def test_a_saved_folder(name: str, config: dict[str, Any], tmp_path: Path, home: Path) -> None:
    from lading import load_model

    _, theirs = pair(name, config)
    theirs.save_pretrained(tmp_path / "model")

    model = load_model(tmp_path / "model", progress=False)

    expected = theirs.state_dict()
    found = model.state_dict()
    assert expected.keys() - found.keys() == ({"wav2vec2.masked_spec_embed"} if name == "Wav2Vec2ForCTC" else set())
    for parameter, tensor in found.items():
        assert torch.equal(tensor, expected[parameter]), parameter
    assert model.training


@pytest.mark.parametrize("name", ["Wav2Vec2ForCTC", "Wav2Vec2ForPreTraining"])
def test_a_sparse_file_means_what_the_full_one_does(name: str) -> None:
    import transformers

    from lading.models.family import family_of_model_type

    family = family_of_model_type("wav2vec2", [name])
    assert family is not None
    full = transformers.Wav2Vec2Config()
    config = family.from_hf({"model_type": "wav2vec2"})

    assert config == family.from_hf(json.loads(full.to_json_string(use_diff=False)))
    with torch.device("meta"):
        ours = {key: value.shape for key, value in family.build(config).state_dict().items()}
        theirs = {key: value.shape for key, value in getattr(transformers, name)(full).state_dict().items()}
    if name == "Wav2Vec2ForCTC":
        del theirs["wav2vec2.masked_spec_embed"]
    assert ours == theirs
