from __future__ import annotations

import pytest
import torch
from torch import nn

from lading.families.nn.uninitialized import Conv1d, Conv2d, Conv3d, Embedding, GroupNorm, LayerNorm, Linear
from tests.helpers.interpreters import Interpreters


@pytest.mark.parametrize(
    ("module", "base"),
    [
        (lambda: Linear(3, 4), nn.Linear),
        (lambda: Embedding(5, 6), nn.Embedding),
        (lambda: LayerNorm(7), nn.LayerNorm),
        (lambda: GroupNorm(2, 4), nn.GroupNorm),
        (lambda: Conv1d(3, 4, 5), nn.Conv1d),
        (lambda: Conv2d(3, 4, 5), nn.Conv2d),
        (lambda: Conv3d(3, 4, 5), nn.Conv3d),
    ],
)
def test_nothing_is_drawn(module, base) -> None:
    before = torch.get_rng_state()

    assert isinstance(module(), base)
    assert torch.equal(torch.get_rng_state(), before)


def test_they_compute_what_torchs_do() -> None:
    ours, theirs = Linear(3, 4), nn.Linear(3, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3)

    assert torch.equal(ours(x), theirs(x))


DECODER = """
from lading.families.nn.decoder_lm import DecoderLM
from lading.families.nn.decoder_spec import DecoderSpec
spec = DecoderSpec(model_dim=64, vocab_size=1000, max_seq_len=64, num_layers=2, num_attn_heads=4,
                   num_key_value_heads=2, ffn_inner_dim=96, norm_eps=1e-5, rope_theta=1e4, pad_idx=3)
make = lambda: DecoderLM(spec)
"""
SPEECH = """
from lading.families.wav2vec2 import FAMILY
FAMILY.model_kls
make = lambda: FAMILY.build(FAMILY.config_kls())
"""
VISION = SPEECH.replace("wav2vec2", "jepa")


@pytest.mark.parametrize("imports", [DECODER, SPEECH, VISION], ids=["decoder", "speech", "vision"])
def test_building_on_the_meta_device_imports_nothing(interpreters: Interpreters, imports: str) -> None:
    script = f"""
import sys, torch
{imports}
before = set(sys.modules)
with torch.device("meta"):
    make()
print(len(set(sys.modules) - before))
"""

    # `with torch.device(...)` itself imports a module.
    assert int(interpreters.run(script)) <= 2
