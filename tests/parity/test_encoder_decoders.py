"""Encoders with a decoder against transformers: the same random weights must give the same outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lading.models.family import family_of_model_type
from tests.helpers.parity_tools import randomise, relative_difference

TOLERANCE = 1e-5

SIZES: dict[str, Any] = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "vocab_size": 53,
}
CASES: dict[str, dict[str, Any]] = {
    "m2m_100": {},
    "speech_to_text": {"input_feat_per_channel": 5},
    "speech_to_text-untied": {"input_feat_per_channel": 5, "tie_word_embeddings": False},
}
CLASSES = {"m2m_100": "M2M100", "speech_to_text": "Speech2Text"}


def theirs_of(case: str) -> Any:
    import transformers

    name = CLASSES[case.partition("-")[0]]
    config = getattr(transformers, f"{name}Config")(**SIZES, **CASES[case])
    torch.manual_seed(len(case))
    model = getattr(transformers, f"{name}ForConditionalGeneration")._from_config(config, attn_implementation="eager")
    randomise(model, gain=1.5)

    return model.eval()


def pair(case: str) -> tuple[Any, Any]:
    """This project's model and that of transformers, with the same weights."""
    theirs = theirs_of(case)
    family = family_of_model_type(case.partition("-")[0])
    assert family is not None
    assert family.name != "hg"
    ours = family.build(family.from_hf(json.loads(theirs.config.to_json_string(use_diff=False)))).eval()
    state = theirs.state_dict()
    assert sorted(ours.state_dict()) == sorted(state)
    ours.load_state_dict(state)

    return ours, theirs


def padding(*lengths: int) -> Tensor:
    return (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()


def inputs(case: str) -> dict[str, Tensor]:
    """A padded source and target, as transformers names them."""
    generator = torch.Generator().manual_seed(1)
    target_mask = padding(9, 5, 9)
    target = torch.randint(4, 53, (3, 9), generator=generator).masked_fill(target_mask == 0, 1)
    if case.startswith("m2m"):
        mask = padding(12, 12, 4)
        source = {"input_ids": torch.randint(4, 53, (3, 12), generator=generator).masked_fill(mask == 0, 1)}
    else:
        mask = padding(50, 31, 14)
        source = {"input_features": torch.randn(3, 50, 5, generator=generator) * mask[:, :, None]}

    return source | {"attention_mask": mask, "decoder_input_ids": target, "decoder_attention_mask": target_mask}


def outputs(ours: Any, theirs: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits of both where the target is not padding."""
    source, source_mask, target, target_mask = given.values()

    found = ours(source, source_mask, target, target_mask=target_mask)
    expected = theirs(**given).logits

    return found[target_mask.bool()], expected[target_mask.bool()]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case: str) -> None:
    ours, theirs = pair(case)

    found, expected = outputs(ours, theirs, inputs(case))
    found.square().mean().backward()
    expected.square().mean().backward()

    assert relative_difference(found, expected) <= TOLERANCE
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        assert float((parameter.grad - gradients[name]).abs().max()) <= 10 * TOLERANCE * largest, name


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_generation(case: str) -> None:
    ours, theirs = pair(case)
    source, mask, target, _ = inputs(case).values()
    first = target[:, :2]
    first[:, 0] = 2  # which transformers puts before a target without it

    found = ours.generate(source, mask, first, max_new_tokens=8, eos_id=2)
    expected = theirs.generate(
        source, attention_mask=mask, decoder_input_ids=first, max_new_tokens=8, do_sample=False, num_beams=1
    )

    assert torch.equal(found, expected[:, : found.size(1)])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_saved_folder(case: str, tmp_path: Path, home: Path) -> None:
    from lading import load_model

    theirs = theirs_of(case)
    theirs.save_pretrained(tmp_path / "model")

    model = load_model(tmp_path / "model", progress=False).eval()

    found, expected = outputs(model, theirs, inputs(case))
    assert relative_difference(found, expected) <= TOLERANCE


@torch.no_grad()
def test_a_folder_of_a_model_without_a_head(tmp_path: Path, home: Path) -> None:
    from lading import load_model

    theirs = theirs_of("m2m_100")
    theirs.model.save_pretrained(tmp_path / "model")

    model = load_model(tmp_path / "model", progress=False).eval()

    found, expected = outputs(model, theirs, inputs("m2m_100"))
    assert relative_difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize(("model_type", "name"), CLASSES.items())
def test_a_sparse_file_means_what_the_full_one_does(model_type: str, name: str) -> None:
    import transformers

    family = family_of_model_type(model_type)
    assert family is not None
    full = getattr(transformers, f"{name}Config")()
    config = family.from_hf({"model_type": model_type})

    assert config == family.from_hf(json.loads(full.to_json_string(use_diff=False)))
    with torch.device("meta"):
        ours = {key: value.shape for key, value in family.build(config).state_dict().items()}
        kls = getattr(transformers, f"{name}ForConditionalGeneration")
        theirs = {key: value.shape for key, value in kls(full).state_dict().items()}
    assert ours == theirs
