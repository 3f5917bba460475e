from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lading.families.nn.cache import KeyValueCache
from lading.families.nn.decoder_lm import DecoderLM, init_decoder
from lading.families.nn.decoder_spec import AttentionTemperature, DecoderSpec
from lading.families.nn.rope_scaling import LinearScaling, LLaMA3Scaling, YaRNScaling

SPEC = DecoderSpec(
    model_dim=32,
    vocab_size=50,
    max_seq_len=64,
    num_layers=3,
    num_attn_heads=4,
    num_key_value_heads=2,
    ffn_inner_dim=48,
    norm_eps=1e-5,
    rope_theta=10_000.0,
)

VARIANTS = {
    "plain": SPEC,
    "window": replace(SPEC, attn_window_len=4),
    "window-behind-full-layers": replace(SPEC, attn_window_len=3, full_attn_layers=frozenset({0, 1})),
    "norms-biases-wide-heads": replace(
        SPEC, q_norm=True, k_norm=True, qkv_proj_bias=True, output_proj_bias=True, ffn_bias=True, head_dim=12
    ),
    "norms-after-over-all-heads": replace(
        SPEC, q_norm=True, k_norm=True, norm_whole=True, norms="after", wide_norm=True, wide_rotary=True
    ),
    "norms-around-windows-that-turn-by-themselves": replace(
        SPEC,
        attn_window_len=4,
        full_attn_layers=frozenset({1}),
        window_rope_theta=33.0,
        rope_scaling=LinearScaling(factor=4.0),
        norms="both",
        norm_offset=1.0,
        wide_norm=True,
        attn_scale=0.2,
        ffn_activation="gelu_tanh",
        embed_scale=5.7,
    ),
    "chunks-and-layers-without-rotation": replace(
        SPEC,
        attn_window_len=4,
        chunked_attn=True,
        full_attn_layers=frozenset({1}),
        unrotated_layers=frozenset({1}),
        adjacent_rotary=True,
        norm_rotated=True,
    ),
    "keys-and-values-of-other-layers": replace(
        SPEC,
        num_layers=4,
        attn_window_len=4,
        full_attn_layers=frozenset({0, 3}),
        num_kv_shared_layers=2,
        v_norm=True,
        ffn_inner_dims=(48, 24, 48, 96),
        ffn_sparsity=(0.0, 0.9, 0.5, 0.0),
        final_logit_soft_cap=3.0,
    ),
    "scaled-tied": replace(
        SPEC,
        tied_embeddings=True,
        rope_scaling=LLaMA3Scaling(factor=8.0, frequency_factors=(1.0, 4.0), original_context_length=16),
    ),
}

each_variant = pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS.keys())


def make(spec: DecoderSpec, seed: int = 0) -> DecoderLM:
    torch.manual_seed(seed)
    model = DecoderLM(spec)
    for name, parameter in model.named_parameters():
        init_decoder(model, name, parameter, std=0.3, std_scale="none")

    return model.eval()


def ids(n: int, s: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SPEC.vocab_size, (n, s), generator=torch.Generator().manual_seed(seed))


# --- the switches


@pytest.mark.parametrize(
    "changes",
    [
        {"norms": "after"},
        {"norms": "both"},
        {"norm_whole": True},
        {"attn_scale": 0.1},
        {"ffn_activation": "gelu_tanh"},
        {"embed_scale": 2.0},
        {"full_attn_layers": frozenset({1})},
        {"window_rope_theta": 33.0},
        {"chunked_attn": True},
        {"adjacent_rotary": True},
        {"unrotated_layers": frozenset({1})},
        {"v_norm": True},
        {"ffn_sparsity": (0.5, 0.0, 0.0)},
        {"final_logit_soft_cap": 2.0},
        {"rope_scaling": LinearScaling(factor=4.0)},
        {
            "rope_scaling": YaRNScaling(
                factor=4.0, original_seq_len=16, beta_fast=4.0, beta_slow=1.0, amplitude=1.1, truncate=True
            )
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
@torch.no_grad()
def test_every_switch_changes_the_result(changes: dict[str, Any]) -> None:
    spec = replace(SPEC, q_norm=True, k_norm=True, attn_window_len=3)

    assert not torch.allclose(make(replace(spec, **changes))(ids(2, 9)), make(spec)(ids(2, 9)), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_is_rotated_is_normalized_without_a_weight() -> None:
    found, expected = (make(replace(SPEC, norm_rotated=on)) for on in (True, False))
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert not torch.allclose(found(ids(2, 9)), expected(ids(2, 9)), rtol=1e-3, atol=1e-3)

    unrotated = replace(SPEC, unrotated_layers=frozenset(range(3)))
    assert torch.equal(make(replace(unrotated, norm_rotated=True))(ids(2, 9)), make(unrotated)(ids(2, 9)))


@torch.no_grad()
def test_the_temperature_of_attention_is_for_layers_without_rotation() -> None:
    temperature = AttentionTemperature(scale=0.5, step=3)
    spec, warm = (replace(SPEC, unrotated_layers=layers) for layers in (frozenset({1}), frozenset[int]()))

    assert torch.equal(make(replace(warm, attn_temperature=temperature))(ids(2, 9)), make(warm)(ids(2, 9)))
    found, expected = make(replace(spec, attn_temperature=temperature))(ids(2, 9)), make(spec)(ids(2, 9))
    assert torch.equal(found[:, :2], expected[:, :2])
    assert not torch.allclose(found[:, 2:], expected[:, 2:], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_switches_of_precision_are_for_half_precision() -> None:
    wide = replace(SPEC, wide_norm=True, wide_rotary=True)
    assert torch.equal(make(wide)(ids(2, 9)), make(SPEC)(ids(2, 9)))

    found, narrow = (make(spec).to(torch.bfloat16)(ids(2, 9)) for spec in (wide, SPEC))
    assert found.dtype == torch.bfloat16
    assert not torch.equal(found, narrow)


@torch.no_grad()
def test_embeddings_are_scaled_by_what_their_dtype_can_say() -> None:
    spec = replace(SPEC, num_layers=1, embed_scale=33.9411)
    model = make(spec).to(torch.bfloat16)
    seen = []
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    model(ids(1, 4))

    assert torch.equal(seen[0], model.model.embed_tokens(ids(1, 4)) * 34.0)


# --- the names


def test_names() -> None:
    spec = replace(SPEC, num_layers=1, q_norm=True, k_norm=True, qkv_proj_bias=True)

    assert list(DecoderLM(spec).state_dict()) == [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.v_proj.bias",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.k_norm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_attn_heads": 0}, "num_attn_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "even"),
        ({"head_dim": 0}, "attn_head_dim"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"pad_idx": 50}, "pad_idx"),
        ({"attn_window_len": 0}, "attn_window_len"),
        ({"dropout_p": 1.0}, "dropout_p"),
    ],
)
def test_sizes_that_make_no_decoder(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        replace(SPEC, **changes)


# --- tied embeddings


def test_a_tied_table_is_one_parameter() -> None:
    model = DecoderLM(VARIANTS["scaled-tied"])

    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert "lm_head.weight" in model.state_dict()


def test_a_tied_table_stays_one_when_it_moves() -> None:
    with torch.device("meta"):
        model = DecoderLM(VARIANTS["scaled-tied"])

    for moved in (model.to_empty(device="cpu"), model.to(torch.bfloat16), model.float()):
        assert moved.lm_head.weight is moved.model.embed_tokens.weight


# --- the forward pass


@each_variant
@torch.no_grad()
def test_what_comes_later_changes_nothing(spec: DecoderSpec) -> None:
    model = make(spec)
    tokens = ids(2, 12)
    other = tokens.clone()
    other[:, 8:] = (other[:, 8:] + 1) % spec.vocab_size

    found, expected = model(other), model(tokens)

    torch.testing.assert_close(found[:, :8], expected[:, :8])
    assert not torch.allclose(found[:, 8:], expected[:, 8:])


@torch.no_grad()
def test_a_window_ends_what_a_token_can_see() -> None:
    model = make(replace(SPEC, num_layers=1, attn_window_len=4))
    tokens = ids(1, 10)
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % SPEC.vocab_size

    found, expected = model(other), model(tokens)

    assert not torch.allclose(found[:, 3], expected[:, 3])
    torch.testing.assert_close(found[:, 4:], expected[:, 4:])


@pytest.mark.few(20)
@each_variant
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 1, 5], [3, 4, 5], [11, 1]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_sequence_may_come_in_parts(spec: DecoderSpec, chunks: list[int], padded: bool) -> None:
    model = make(spec)
    tokens = ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    if padded:
        mask[1, :3] = 0

    expected = model(tokens, attention_mask=mask if padded else None)
    cache = KeyValueCache()
    parts, at = [], 0
    for count in chunks:
        at += count
        part_mask = mask[:, :at] if padded else None
        parts.append(model(tokens[:, at - count : at], attention_mask=part_mask, cache=cache))

    assert cache.num_tokens == 12
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], expected[real], rtol=1e-4, atol=1e-5)


@each_variant
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(spec: DecoderSpec) -> None:
    model = make(spec)
    tokens = ids(1, 7)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), tokens), dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 7])

    torch.testing.assert_close(model(padded, attention_mask=mask)[:, 5:], model(tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_logits_of_the_last_token_alone() -> None:
    model = make(SPEC)
    tokens = ids(2, 9)

    found = model(tokens, last_only=True)

    assert found.shape == (2, 1, SPEC.vocab_size)
    torch.testing.assert_close(found, model(tokens)[:, -1:])


@torch.no_grad()
def test_positions_count_on_from_the_cache() -> None:
    model = make(SPEC)
    tokens = ids(1, 9)

    torch.testing.assert_close(model(tokens, position_ids=torch.arange(9)[None]), model(tokens))
    assert not torch.allclose(model(tokens, position_ids=torch.arange(9)[None] * 2), model(tokens))


def test_too_many_tokens() -> None:
    model = make(SPEC)
    cache = KeyValueCache()
    model(ids(1, 60), cache=cache)

    with pytest.raises(ValueError, match=r"max_seq_len.*64.*65 tokens"):
        model(ids(1, 5), cache=cache)


@pytest.mark.parametrize("shape", [(2, 8), (1, 9), (2, 9, 1)])
def test_a_mask_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(2, 9\)"):
        make(SPEC)(ids(2, 9), attention_mask=torch.ones(shape))


def test_dropout_is_a_matter_of_training() -> None:
    model = make(replace(SPEC, dropout_p=0.5))
    tokens = ids(1, 9)

    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_training_without_dropout_computes_the_same() -> None:
    model = make(SPEC)
    tokens = ids(1, 9)

    assert torch.equal(model.train()(tokens), model.eval()(tokens))


@each_variant
def test_every_parameter_has_a_gradient(spec: DecoderSpec) -> None:
    model = make(spec)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0

    model(ids(2, 9), attention_mask=mask).square().mean().backward()

    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_half_precision_keeps_its_dtype() -> None:
    model = make(VARIANTS["norms-biases-wide-heads"]).to(torch.bfloat16)

    assert model(ids(2, 9)).dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_forward_pass_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = DecoderLM(VARIANTS["window"])
        logits = model(torch.zeros(2, 9, dtype=torch.long), attention_mask=torch.ones(2, 9))

    assert logits.is_meta
    assert logits.shape == (2, 9, SPEC.vocab_size)


# --- generation


@each_variant
@torch.no_grad()
def test_generation_is_the_argmax_over_and_over(spec: DecoderSpec) -> None:
    model = make(spec)
    expected = ids(2, 6)
    for _ in range(15):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)

    assert torch.equal(model.generate(ids(2, 6), max_new_tokens=15), expected)


@torch.no_grad()
def test_a_padded_batch_generates_what_its_sequences_would_alone() -> None:
    model = make(VARIANTS["window"])
    long, short = ids(1, 8, seed=2), ids(1, 3, seed=3)
    batch = torch.cat((long, torch.cat((torch.zeros(1, 5, dtype=torch.long), short), dim=1)))
    mask = torch.tensor([[1] * 8, [0] * 5 + [1] * 3])

    found = model.generate(batch, max_new_tokens=10, attention_mask=mask)

    assert torch.equal(found[:1], model.generate(long, max_new_tokens=10))
    assert torch.equal(found[1:, 5:], model.generate(short, max_new_tokens=10))


@pytest.mark.parametrize("pad_idx", [None, 49])
def test_a_sequence_that_has_ended_is_filled_up(pad_idx: int | None) -> None:
    model = make(replace(SPEC, pad_idx=pad_idx))
    prompt = ids(2, 6)
    free = model.generate(prompt, max_new_tokens=12)
    end = int(free[0, 8])
    assert end not in free[1, 6:]

    found = model.generate(prompt, max_new_tokens=12, eos_id=end)

    at = 6 + free[0, 6:].tolist().index(end)
    filler = end if pad_idx is None else pad_idx
    assert found[0].tolist() == free[0, : at + 1].tolist() + [filler] * (17 - at)
    assert torch.equal(found[1], free[1])


def test_generation_stops_when_all_have_ended() -> None:
    model = make(SPEC)
    prompt = ids(2, 6)
    free = model.generate(prompt, max_new_tokens=12)

    found = model.generate(prompt, max_new_tokens=12, eos_id=[int(free[0, 6]), int(free[1, 6])])

    assert torch.equal(found, free[:, :7])


@pytest.mark.parametrize("pad_idx", [None, 49])
def test_no_token_ends_a_sequence(pad_idx: int | None) -> None:
    model = make(replace(SPEC, pad_idx=pad_idx))

    assert torch.equal(
        model.generate(ids(2, 6), max_new_tokens=4, eos_id=[]), model.generate(ids(2, 6), max_new_tokens=4)
    )


def test_nothing_new() -> None:
    assert torch.equal(make(SPEC).generate(ids(2, 6), max_new_tokens=0), ids(2, 6))


def test_generation_records_no_gradients_and_keeps_the_mode() -> None:
    model = make(SPEC).train()

    found = model.generate(ids(1, 3), max_new_tokens=2)

    assert model.training
    assert not found.is_inference()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("length", "options", "word"),
    [
        (0, {"max_new_tokens": 1}, "at least one token"),
        (3, {"max_new_tokens": -1}, "negative"),
        (3, {"max_new_tokens": 62}, "max_seq_len"),
        (3, {"max_new_tokens": 1, "attention_mask": torch.tensor([[1, 1, 0]])}, "on the left"),
        (3, {"max_new_tokens": 1, "attention_mask": torch.ones(1, 4)}, r"\(1, 3\)"),
    ],
)
def test_what_cannot_be_generated(length: int, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make(SPEC).generate(ids(1, length), **options)


# --- random weights


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() == 2}


def initialized(spec: DecoderSpec, **options: Any) -> DecoderLM:
    torch.manual_seed(0)
    model = DecoderLM(spec)
    for name, parameter in model.named_parameters():
        nn.init.constant_(parameter, torch.nan)
        init_decoder(model, name, parameter, **options)

    return model


BIG = replace(SPEC, model_dim=256, ffn_inner_dim=384, vocab_size=500, qkv_proj_bias=True, q_norm=True)


def test_everything_is_initialized() -> None:
    model = initialized(BIG)

    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.isfinite().all(), name


@pytest.mark.parametrize("scale", ["none", "layer", "stack"])
@pytest.mark.parametrize("std", [None, 0.05])
def test_standard_deviations(scale: str, std: float | None) -> None:
    for name, weight in weights(initialized(BIG, std=std, std_scale=scale)).items():
        expected = weight.size(1) ** -0.5 if std is None else std
        if "layers" in name:
            layer = int(name.split(".")[2])
            expected /= {"none": 1.0, "layer": (2 * (layer + 1)) ** 0.5, "stack": (2 * 4) ** 0.5}[scale]

        # A normal distribution that is cut at three standard deviations has 0.987 of its own.
        assert float(weight.std()) == pytest.approx(0.987 * expected, rel=0.05), name
        assert float(weight.abs().max()) <= 3.0001 * expected, name


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = initialized(BIG).state_dict(), initialized(BIG).state_dict()

    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_padding_symbol_is_zero() -> None:
    model = initialized(replace(BIG, pad_idx=7, tied_embeddings=True))

    table = model.model.embed_tokens.weight
    assert (table[7] == 0).all()
    assert (table[8] != 0).any()
