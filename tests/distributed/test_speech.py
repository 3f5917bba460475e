"""What ranks compute together of speech, and in translations, is what one process computes alone: real processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module

from lading.families.nllb import NllbConfig, get_nllb_model_hub
from lading.families.nn.encoder_decoder import EncoderDecoder
from lading.families.s2t_conformer import S2TConformerConfig
from lading.families.s2t_transformer import S2TTransformerConfig
from lading.families.w2vbert import W2VBertConfig
from lading.families.wav2vec2 import Wav2Vec2Config
from lading.families.wav2vec2_asr import Wav2Vec2AsrConfig
from lading.families.wav2vec2_encoder import Wav2Vec2EncoderConfig
from lading.gangs import create_fake_gangs, create_gangs
from lading.models.construct import create_model
from lading.models.family import get_family
from tests.distributed.tiny_models import compare_with_one, whole
from tests.distributed.workers import Pool

ENCODER = Wav2Vec2EncoderConfig(
    model_dim=24,
    feature_dim=9,  # which does not divide over two ranks
    feature_extractor_layer_descs=[(7, 10, 5), (9, 3, 2)],
    pos_conv_kernel_size=4,
    num_pos_conv_groups=3,
    num_encoder_layers=3,
    num_encoder_attn_heads=4,
    ffn_inner_dim=20,
    dropout_p=0.0,
    attn_dropout_p=0.0,
    layer_drop_p=0.5,
    init_std=0.3,
)
# The vocabulary and the frames of filter banks do not divide over two ranks.
STACKS: dict[str, Any] = {
    "model_dim": 24,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attn_heads": 4,
    "num_decoder_attn_heads": 6,
    "ffn_inner_dim": 20,
    "dropout_p": 0.0,
}
CONFORMER = replace(
    ENCODER,
    layer_norm_features=False,
    pos_encoder_type="relative",
    use_conformer=True,
    depthwise_conv_kernel_size=3,
    layer_drop_p=0.0,
)
CONFIGS = {
    "nllb": NllbConfig(**STACKS, vocab_size=31, max_seq_len=20),
    "s2t_conformer": S2TConformerConfig(
        **STACKS, target_vocab_size=31, num_fbank_channels=3, depthwise_conv_kernel_size=3, use_relative_pos=True
    ),
    "s2t_transformer": S2TTransformerConfig(**STACKS, target_vocab_size=31, num_fbank_channels=3),
    "w2vbert": W2VBertConfig(
        w2v2_config=Wav2Vec2Config(
            encoder_config=CONFORMER,
            quantized_dim=6,
            num_codebook_entries=5,
            temporal_mask_span_len=3,
            num_distractors=4,
        ),
        num_bert_encoder_layers=1,
    ),
    "wav2vec2": Wav2Vec2Config(
        encoder_config=ENCODER, quantized_dim=6, num_codebook_entries=5, temporal_mask_span_len=3, num_distractors=4
    ),
    "wav2vec2_asr": Wav2Vec2AsrConfig(
        encoder_config=ENCODER, target_vocab_size=5, temporal_mask_span_len=3, spatial_mask_span_len=2
    ),
}


def logits(model: Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sound = torch.randn(2, 403, generator=generator)
    mask = (torch.arange(403)[None] < torch.tensor([[403], [300]])).long()
    if isinstance(model, EncoderDecoder):
        ids = torch.randint(4, 31, (2, 13), generator=generator)
        if model.spec.num_fbank_channels is None:
            found: Tensor = model(ids, mask[:, -13:], ids[:, :9])
        else:
            found = model(sound[:, :399].view(2, 133, 3), mask[:, ::3][:, :133], ids)
    else:
        found = model(sound, mask).logits

    return found


def compare(family_name: str, axes: dict[str, int]) -> list[str]:
    """Masks, dropped layers and noise are the same where the seeds are."""
    return compare_with_one(family_name, CONFIGS[family_name], axes, logits)


@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("wav2vec2", {"tp": 2}),
        ("wav2vec2_asr", {"sdp": 2}),
        ("nllb", {"tp": 2}),
        ("nllb", {"sdp": 2}),
        ("s2t_transformer", {"tp": 2}),
        ("s2t_conformer", {"tp": 2}),
        pytest.param("s2t_conformer", {"sdp": 2}, marks=pytest.mark.slow),
        pytest.param("s2t_transformer", {"sdp": 2}, marks=pytest.mark.slow),
        pytest.param("w2vbert", {"tp": 2}, marks=pytest.mark.slow),
        pytest.param("w2vbert", {"sdp": 2}, marks=pytest.mark.slow),
        pytest.param("wav2vec2", {"sdp": 2}, marks=pytest.mark.slow),
        pytest.param("wav2vec2_asr", {"tp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_ranks(pool2: Pool, family: str, axes: dict[str, int]) -> None:
    assert pool2.values(compare, family, axes) == [[]] * 2


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["nllb", "wav2vec2", "wav2vec2_asr", "w2vbert", "s2t_conformer", "s2t_transformer"])
def test_four_ranks(pool4: Pool, family: str) -> None:
    assert pool4.values(compare, family, {"tp": 2, "sdp": 2}) == [[]] * 4


def load_from_fairseq(path: Path, axes: dict[str, int]) -> list[str]:
    hub = get_nllb_model_hub()
    config: Any = CONFIGS["nllb"]
    alone = hub.load_custom_model(path, config, progress=False).eval()

    with create_gangs("cpu", **axes) as gangs:
        model = hub.load_custom_model(path, config, gangs=gangs, progress=False).eval()
        expected = dict(alone.named_parameters())
        found = [
            name for name, held in model.named_parameters() if not torch.equal(whole(held.detach()), expected[name])
        ]
        ids = torch.arange(4, 24).view(2, 10)
        if not torch.equal(*(each.generate(ids, None, ids[:, :2], max_new_tokens=5) for each in (model, alone))):
            found.append("what is generated")

    return found


def test_a_table_whose_rows_are_in_another_order(pool2: Pool, tmp_path: Path, home: Path) -> None:
    torch.manual_seed(0)
    model = create_model(
        get_family("nllb"), CONFIGS["nllb"], gangs=create_fake_gangs("cpu"), dtype=torch.float32, meta=False
    )
    state = model.state_dict()
    table = state.pop("model.shared.weight")
    state["decoder.output_projection.weight"] = state.pop("lm_head.weight")
    torch.save({name.removeprefix("model."): tensor for name, tensor in state.items()}, tmp_path / "model.pt")
    loaded = get_nllb_model_hub().load_custom_model(tmp_path / "model.pt", CONFIGS["nllb"], progress=False)  # type: ignore[arg-type]
    assert torch.equal(loaded.model.shared.weight[:5], table[[1, 3, 0, 2, 4]])

    for axes in ({"tp": 2}, {"sdp": 2}):
        assert pool2.values(load_from_fairseq, tmp_path / "model.pt", axes) == [[]] * 2
