from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import init

from lading.families.jepa import FAMILY, Jepa, JepaConfig, JepaEncoderConfig, get_jepa_model_hub
from lading.families.jepa_classifier import JepaClassifierConfig, get_jepa_classifier_model_hub
from lading.models.family import get_family
from lading.planning.rules import rename

IMAGES = JepaEncoderConfig(
    model_dim=24, input_dims=(16, 16), patch_dims=(4, 4), num_encoder_layers=2, num_encoder_attn_heads=3
)
VIDEO = replace(IMAGES, input_dims=(4, 16, 16), patch_dims=(2, 4, 4), num_input_channels=1)


def make(encoder: JepaEncoderConfig = IMAGES) -> Jepa:
    torch.manual_seed(0)

    return get_jepa_model_hub().create_new_model(JepaConfig(encoder_config=replace(encoder, init_std=0.3))).eval()


def test_they_are_registered() -> None:
    assert get_family("jepa") is FAMILY
    assert get_family("jepa_classifier").config_kls is JepaClassifierConfig


@torch.no_grad()
def test_patches_in_the_order_of_the_dimensions() -> None:
    assert make()(torch.randn(2, 3, 16, 16)).shape == (2, 16, 24)
    assert make(VIDEO)(torch.randn(2, 1, 4, 16, 16)).shape == (2, 32, 24)
    assert make(VIDEO)(torch.randn(2, 1, 7, 18, 9)).shape == (2, 3 * 4 * 2, 24)  # a part of a patch is left out


@torch.no_grad()
def test_positions_matter() -> None:
    found = make()(torch.ones(1, 3, 16, 16))

    assert float((found[0, :1] - found[0, 1:]).abs().amax(1).min()) > 1e-2


@torch.no_grad()
def test_several_queries_have_logits_each() -> None:
    config = JepaClassifierConfig(encoder_config=IMAGES, num_classes=5)
    hub = get_jepa_classifier_model_hub()
    x = torch.randn(2, 3, 16, 16)

    assert hub.create_new_model(config)(x).shape == (2, 5)
    assert hub.create_new_model(replace(config, num_queries=4))(x).shape == (2, 4, 5)


@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 1, 16, 16), (2, 3, 3, 16), (2, 3, 2, 16, 16)], ids=str)
def test_inputs_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(N, 3, 4 or more, 4 or more\), but is of shape"):
        make()(torch.zeros(shape))


@pytest.mark.parametrize("field", ["dropout_p", "attn_dropout_p", "droppath_p"])
def test_dropout_is_a_matter_of_training(field: str) -> None:
    model = make(replace(IMAGES, **{field: 0.5}))
    x = torch.randn(4, 3, 16, 16)

    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@torch.no_grad()
def test_a_skipped_block_leaves_an_input_as_it_is() -> None:
    model = make(replace(IMAGES, droppath_p=0.999)).train()
    x = torch.randn(2, 3, 16, 16)

    torch.testing.assert_close(model(x), model.layernorm(model.embeddings(x)))


@torch.no_grad()
def test_the_pooler_drops_no_outputs() -> None:
    encoder = replace(IMAGES, dropout_p=0.5, droppath_p=0.5)
    model = get_jepa_classifier_model_hub().create_new_model(JepaClassifierConfig(encoder_config=encoder)).train()
    x = torch.randn(4, 16, 24)

    assert torch.equal(model.attn_pooler(x), model.attn_pooler(x))


@torch.no_grad()
def test_half_precision() -> None:
    model, x = make(), torch.randn(1, 3, 16, 16)
    expected = model(x)

    found = model.bfloat16()(x.bfloat16())

    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


def test_random_weights() -> None:
    torch.manual_seed(0)
    config = JepaConfig(encoder_config=replace(IMAGES, model_dim=120, learned_positions=True))
    model = FAMILY.build(config)
    for name, parameter in model.named_parameters():
        init.constant_(parameter, torch.nan)
        FAMILY.init(model, config, name, parameter)

    x = torch.zeros(1, 3, 16, 16)
    computed = FAMILY.build(JepaConfig(encoder_config=replace(config.encoder_config, learned_positions=False)))
    computed.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model.embeddings(x), computed.embeddings(x))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "layernorm" in name:
            assert (parameter == 1).all(), name
        elif "position" not in name:
            scale = (2 * (1 + int(name.split(".")[2]))) ** 0.5 if ".output." in name else 1.0
            assert float(parameter.detach().std()) * scale == pytest.approx(0.02, rel=0.15), name


# --- checkpoints


def test_one_tensor_for_queries_keys_and_values() -> None:
    rules = FAMILY.rules(JepaConfig(encoder_config=IMAGES))

    assert rename(["module.backbone.blocks.1.attn.qkv.bias"], rules) == [
        f"encoder.layer.1.attention.attention.{name}.bias" for name in ("query", "key", "value")
    ]


@pytest.mark.parametrize("name", ["pos_embed", "module.pos_embed", "module.backbone.pos_embed"])
def test_positions_of_a_checkpoint(name: str) -> None:
    """They are used only if the configuration says so: fairseq2 computes them."""
    learned = replace(IMAGES, learned_positions=True)

    assert rename([name], FAMILY.rules(JepaConfig(encoder_config=IMAGES))) == [None]
    assert rename([name], FAMILY.rules(JepaConfig(encoder_config=learned))) == ["embeddings.position_embeddings"]
