"""BERT against transformers: the same random weights must give the same hidden states.

The relative difference of two tensors is ``max |a - b| / max |b|`` over all of their elements.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.parity_tools import randomise, relative_difference

TOLERANCE = 1e-5
VOCAB = 89

CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "one-head": {"num_attention_heads": 1},
    "tanh": {"hidden_act": "gelu_new"},
    "tanh-of-torch": {"hidden_act": "gelu_pytorch_tanh"},
    "eps-and-types": {"layer_norm_eps": 1e-3, "type_vocab_size": 4},
    "no-padding-symbol": {"pad_token_id": None},
}

by_case = pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())


def pair(config: dict[str, Any]) -> tuple[Any, nn.Module]:
    """This project's model and that of transformers, with the same weights."""
    from transformers import BertConfig, BertModel

    from lading.families.bert import FAMILY

    torch.manual_seed(len(config))

    values = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
        **config,
    }
    theirs_config = BertConfig(**values)
    theirs = BertModel._from_config(theirs_config, attn_implementation="eager").eval()
    randomise(theirs)

    written = FAMILY.from_hf(json.loads(theirs_config.to_json_string(use_diff=False)))
    assert written == FAMILY.from_hf({"model_type": "bert", **values})

    ours = FAMILY.build(written).eval()
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    ours.load_state_dict(state)

    return ours, theirs


@by_case
@torch.no_grad()
def test_hidden_states_and_pooler(config: dict[str, Any]) -> None:
    ours, theirs = pair(config)
    ids = torch.randint(1, VOCAB, (3, 21))

    hidden = ours(ids)
    expected = theirs(ids)

    assert relative_difference(hidden, expected.last_hidden_state) <= TOLERANCE
    assert relative_difference(ours.pooled_output(hidden), expected.pooler_output) <= TOLERANCE


@by_case
@torch.no_grad()
def test_padding_types_and_positions(config: dict[str, Any]) -> None:
    ours, theirs = pair(config)
    ids = torch.randint(1, VOCAB, (3, 21))
    mask = (torch.arange(21)[None] < torch.tensor([[21], [8], [1]])).long()
    types = torch.randint(0, 2, (3, 21))
    positions = torch.arange(21)[None] + torch.tensor([[0], [5], [19]])

    arguments = {"attention_mask": mask, "token_type_ids": types, "position_ids": positions}
    hidden = ours(ids, **arguments)
    expected = theirs(ids, **arguments).last_hidden_state

    real = mask.bool()
    assert relative_difference(hidden[real], expected[real]) <= TOLERANCE


@torch.no_grad()
def test_sentence_embeddings_are_the_normalised_mean() -> None:
    ours, theirs = pair({})
    ids = torch.randint(1, VOCAB, (3, 21))
    mask = (torch.arange(21)[None] < torch.tensor([[21], [8], [1]])).long()

    states = theirs(ids, attention_mask=mask).last_hidden_state
    expected = torch.stack([states[i, :n].mean(0) for i, n in enumerate((21, 8, 1))])
    expected /= expected.norm(dim=1, keepdim=True)

    assert relative_difference(ours.encode(ids, mask), expected) <= TOLERANCE


def test_gradients() -> None:
    ours, theirs = pair({})
    ids = torch.randint(1, VOCAB, (2, 9))

    hidden = ours(ids)
    (hidden.square().mean() + ours.pooled_output(hidden).square().mean()).backward()
    output = theirs(ids)
    (output.last_hidden_state.square().mean() + output.pooler_output.square().mean()).backward()

    largest = max(float(parameter.grad.abs().max()) for parameter in theirs.parameters())
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        # Against the largest of all: the keys' bias has no gradient but noise, as softmax is blind to it.
        assert float((parameter.grad - expected[name].grad).abs().max()) <= 10 * TOLERANCE * largest, name
