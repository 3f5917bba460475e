from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lading.families.nn.encoder import EncoderSpec

SPEC = EncoderSpec(
    model_dim=24,
    max_seq_len=16,
    vocab_size=30,
    type_vocab_size=2,
    pad_idx=0,
    num_layers=2,
    num_attn_heads=3,
    ffn_inner_dim=40,
    ffn_activation="gelu",
    norm_eps=1e-12,
    dropout_p=0.1,
    attn_dropout_p=0.1,
)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_attn_heads": 0}, "num_attn_heads"),
        ({"num_attn_heads": 5}, "multiple of `num_attn_heads`"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"ffn_activation": "relu"}, "ffn_activation"),
        ({"pad_idx": 30}, "pad_idx"),
        ({"dropout_p": 1.0}, "dropout_p"),
        ({"attn_dropout_p": -0.1}, "attn_dropout_p"),
    ],
)
def test_sizes_that_make_no_encoder(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        replace(SPEC, **changes)
