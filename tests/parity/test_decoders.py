"""The decoders against transformers: the same random weights must give the same logits and the same continuations.

The relative difference of two tensors is ``max |a - b| / max |b|`` over all of their elements.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lading.families.nn.decoder_lm import DecoderLM
from tests.helpers.parity_tools import family_of, randomise, relative_difference

TOLERANCE = 1e-5
VOCAB = 101
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA_3N: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
    "num_kv_shared_layers": 2,
    "laurel_rank": 6,
    "vocab_size_per_layer_input": 90,
    "hidden_size_per_layer_input": 8,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "router_jitter_noise": 0.0}
LLAMA4 = {
    "head_dim": 16,
    "num_key_value_heads": 2,
    "intermediate_size_mlp": 80,
    "num_local_experts": 4,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 5,
    "floor_scale": 4,
    "attn_scale": 0.5,
}


@dataclass(frozen=True)
class Case:
    id: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("llama", "llama"),
    Case("llama-gqa", "llama", {"num_key_value_heads": 2}),
    Case("llama-mqa-tied", "llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    Case("llama-wide-heads", "llama", {"head_dim": 32}),
    Case("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Case("llama-theta-eps", "llama", {"rope_theta": 500_000.0, "rms_norm_eps": 1e-3}),
    Case("llama3-scaling", "llama", {"rope_theta": 500_000.0, "rope_scaling": LLAMA3, "num_key_value_heads": 4}),
    Case("llama-padding-symbol", "llama", {"pad_token_id": 3}),
    Case("qwen2", "qwen2", {"num_key_value_heads": 2}),
    Case("qwen2-tied", "qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 1e6}),
    Case("qwen2-window", "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    Case("qwen2-window-all", "qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    Case("qwen3", "qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    Case("qwen3-wide-heads-tied", "qwen3", {"num_key_value_heads": 4, "head_dim": 24, "tie_word_embeddings": True}),
    Case(
        "qwen3-window",
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    Case("mistral", "mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    Case("mistral-window", "mistral", {"num_key_value_heads": 4, "sliding_window": 7, "head_dim": 20}),
    Case("mistral-window-1", "mistral", {"sliding_window": 1}),
    Case("olmo2", "olmo2"),
    Case("olmo2-gqa-tied", "olmo2", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    Case("olmo3", "olmo3", {"num_hidden_layers": 5, "num_key_value_heads": 2, "sliding_window": 5}),
    Case("olmo3-yarn", "olmo3", {"num_hidden_layers": 5, "sliding_window": 6, "rope_scaling": YARN}),
    Case(
        "olmo3-yarn-types-and-amplitude",
        "olmo3",
        {
            "sliding_window": 6,
            "rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 4.0, "beta_slow": 0.5},
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    Case("olmo3-yarn-mscale", "olmo3", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}}),
    Case("gemma3", "gemma3_text", {"num_hidden_layers": 7, "head_dim": 16, "sliding_window": 5}),
    Case(
        "gemma3-scaled",
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "sliding_window_pattern": 2,
            "sliding_window": 6,
            "head_dim": 12,
            "num_key_value_heads": 2,
            "query_pre_attn_scalar": 40,
            "rope_theta": 12_345.0,
            "rope_local_base_freq": 77.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "tie_word_embeddings": False,
        },
    ),
    Case("mixtral", "mixtral", {**EXPERTS, "num_local_experts": 5, "num_key_value_heads": 2}),
    Case("mixtral-window", "mixtral", {**EXPERTS, "num_local_experts": 4, "sliding_window": 7, "head_dim": 20}),
    Case("qwen3-moe", "qwen3_moe", {**EXPERTS, "num_experts": 6, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    Case("qwen3-moe-odd-width", "qwen3_moe", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 23}),
    Case(
        "qwen3-moe-window",
        "qwen3_moe",
        {**EXPERTS, "num_experts": 8, "use_sliding_window": True, "sliding_window": 6, "decoder_sparse_step": 2},
    ),
    Case("llama4", "llama4_text", LLAMA4),
    Case(
        "llama4-interleaved",
        "llama4_text",
        LLAMA4
        | {
            "num_hidden_layers": 5,
            "interleave_moe_layer_step": 2,
            "num_experts_per_tok": 2,
            "no_rope_layers": [1, 0, 1, 0, 1],
            "attention_chunk_size": 6,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "llama4-scaled-without-rotation-at-the-end",
        "llama4_text",
        LLAMA4
        | {
            "rope_scaling": LLAMA3 | {"high_freq_factor": 1.0, "factor": 16.0},
            "no_rope_layers": [1, 1, 0],
            "moe_layers": [2],
            "attention_bias": True,
            "rms_norm_eps": 1e-3,
        },
    ),
    Case("deepseek", "deepseek_v3", {**LATENT, "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    Case(
        "deepseek-queries-in-one-step",
        "deepseek_v3",
        {
            **LATENT,
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_interleave": False,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "first_k_dense_replace": 2,
            "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
        },
    ),
    Case("deepseek-dense", "deepseek_v3", {**LATENT, "first_k_dense_replace": 3, "rope_theta": 77.0}),
    Case("mistral-window-as-long", "mistral", {"sliding_window": 17, "tie_word_embeddings": True}),
    Case("gemma3n", "gemma3n_text", GEMMA_3N),
    Case(
        "gemma3n-widths",
        "gemma3n_text",
        GEMMA_3N
        | {
            "intermediate_size": [96, 64, 96, 32],
            "activation_sparsity_pattern": [0.0, 0.5, 0.95, 0.0],
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 1,
            "num_key_value_heads": 1,
            "altup_num_inputs": 3,
            "altup_active_idx": 1,
            "altup_correct_scale": False,
            "final_logit_softcapping": 3.0,
            "rope_theta": 12_345.0,
            "rope_local_base_freq": 77.0,
            "tie_word_embeddings": False,
        },
    ),
    Case("gemma3n-shares-nothing", "gemma3n_text", GEMMA_3N | {"num_kv_shared_layers": 0, "altup_num_inputs": 1}),
]

QUICK = {
    "llama-mqa-tied", "llama-biases", "llama3-scaling", "qwen2", "qwen2-window", "qwen3-wide-heads-tied",
    "mistral-window", "mistral-window-1", "olmo2-gqa-tied", "olmo3", "olmo3-yarn-types-and-amplitude", "gemma3",
    "deepseek", "deepseek-queries-in-one-step", "gemma3-scaled", "mixtral-window", "qwen3-moe", "qwen3-moe-odd-width",
    "llama4", "llama4-interleaved", "gemma3n", "gemma3n-widths",
}  # fmt: skip
"""Each family, and each kind of heads, of windows, of rotary scaling, of experts and of ties."""


@pytest.fixture(
    scope="module",
    params=[case if case.id in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: case.id,
)
def both(request: pytest.FixtureRequest) -> tuple[DecoderLM, nn.Module]:
    """The models of a case, which no test changes."""
    return pair(request.param)


def pair(case: Case) -> tuple[DecoderLM, nn.Module]:
    """This project's model and that of transformers, with the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(len(case.id))

    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 256,
        **case.config,
    }
    theirs_config = AutoConfig.for_model(case.model_type, **values)
    # Its grouped products take some widths only.
    theirs = AutoModelForCausalLM.from_config(
        theirs_config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    randomise(theirs)

    family = family_of(case.model_type)
    # The file that transformers writes today, and the spelling of the files that are on the hub.
    written = family.build(family.from_hf(json.loads(theirs_config.to_json_string(use_diff=False))))
    ours: DecoderLM = family.build(family.from_hf({"model_type": case.model_type, **values})).eval()
    assert replace(written.spec, head_dim=written.spec.attn_head_dim) == replace(
        ours.spec, head_dim=ours.spec.attn_head_dim
    )

    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    ours.load_state_dict(state)

    return ours, theirs


def tokens(n: int, s: int) -> Tensor:
    return torch.randint(4, VOCAB, (n, s), generator=torch.Generator().manual_seed(n * s))


def continue_theirs(theirs: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    """transformers' greedy continuation, with its cache."""
    # Its cache keeps the last `window - 1` tokens as `[-(window - 1):]`, which for a window of one is all of them.
    use_cache = getattr(theirs.config, "sliding_window", None) != 1

    return theirs.generate(
        ids, **{"do_sample": False, "use_cache": use_cache, "eos_token_id": None, "pad_token_id": 0, **options}
    )


def padding(lengths: list[int], s: int, side: str) -> Tensor:
    """(N, S) with 1 for a token."""
    index = torch.arange(s)[None]
    length = torch.tensor(lengths)[:, None]

    return (index < length if side == "right" else index >= s - length).long()


@torch.no_grad()
def test_logits(both: tuple[DecoderLM, nn.Module]) -> None:
    ours, theirs = both
    ids = tokens(3, 17)

    assert relative_difference(ours(ids), theirs(ids).logits) <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_of_padded_batches(both: tuple[DecoderLM, nn.Module], side: str) -> None:
    ours, theirs = both
    ids, mask = tokens(3, 17), padding([17, 9, 1], 17, side)

    real = mask.bool()
    found = ours(ids, attention_mask=mask)
    expected = theirs(ids, attention_mask=mask).logits

    assert relative_difference(found[real], expected[real]) <= TOLERANCE
    assert found.isfinite().all()


@torch.no_grad()
def test_logits_at_given_positions(both: tuple[DecoderLM, nn.Module]) -> None:
    ours, theirs = both
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    positions = torch.stack((torch.arange(13) + 40, torch.arange(13) * 3))

    found = ours(ids, attention_mask=mask, position_ids=positions)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits

    assert relative_difference(found, expected) <= TOLERANCE


@pytest.mark.few(5)
def test_greedy_continuation(both: tuple[DecoderLM, nn.Module]) -> None:
    ours, theirs = both
    ids = tokens(2, 11)

    expected = continue_theirs(theirs, ids, max_new_tokens=20)

    assert torch.equal(ours.generate(ids, max_new_tokens=20), expected)


@pytest.mark.few(5)
def test_greedy_continuation_of_a_padded_batch(both: tuple[DecoderLM, nn.Module]) -> None:
    ours, theirs = both
    ids, mask = tokens(3, 11), padding([11, 6, 1], 11, "left")

    free = continue_theirs(theirs, ids, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(ours.generate(ids, max_new_tokens=20, attention_mask=mask), free)

    # Two of the tokens that it says end sequences, at different places.
    ends = [int(free[0, 14]), int(free[1, 17])]
    filler = ends[0] if ours.spec.pad_idx is None else ours.spec.pad_idx
    ended = continue_theirs(theirs, ids, attention_mask=mask, max_new_tokens=20, eos_token_id=ends, pad_token_id=filler)
    assert torch.equal(ours.generate(ids, max_new_tokens=20, eos_id=ends, attention_mask=mask), ended)


@pytest.mark.parametrize("model_type", ["llama", "llama4_text", "qwen2", "qwen3", "mistral", "mixtral"])
@torch.no_grad()
def test_half_precision(model_type: str) -> None:
    """In bfloat16 the order of casts shows: with the same order the difference is that of summation alone."""
    ours, theirs = pair(Case(model_type, model_type))
    exact = theirs(ids := tokens(2, 17)).logits
    ours, theirs = ours.to(torch.bfloat16), theirs.to(torch.bfloat16)

    found, expected = ours(ids).float(), theirs(ids).logits.float()

    assert relative_difference(found, exact) <= 1.5 * relative_difference(expected, exact)


@pytest.mark.parametrize(
    "case",
    [
        CASES[1],
        CASES[4],
        CASES[12],
        CASES[16],
        *(case for case in CASES if case.id in ("mixtral", "qwen3-moe", "llama4", "deepseek", "gemma3n")),
    ],
    ids=lambda case: case.id,
)
def test_gradients(case: Case) -> None:
    ours, theirs = pair(case)
    ids = tokens(2, 9)

    ours(ids).square().mean().backward()
    theirs(ids).logits.square().mean().backward()

    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_difference(parameter.grad, expected[name].grad) <= 10 * TOLERANCE, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "heads", "width", "tied", "window"),
    list(
        product(["llama", "qwen2", "qwen3", "mistral"], [(8, 8), (8, 2), (6, 1)], [8, 20], [False, True], [None, 3, 9])
    ),
)
def test_every_combination(model_type: str, heads: tuple[int, int], width: int, tied: bool, window: int | None) -> None:
    config: dict[str, Any] = {
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": width,
        "hidden_size": 48,
        "tie_word_embeddings": tied,
    }
    if model_type == "mistral":
        config["sliding_window"] = window
    elif model_type != "llama":
        config |= {"use_sliding_window": window is not None, "sliding_window": window or 4096, "max_window_layers": 1}
    else:
        config |= {"attention_bias": window == 3, "mlp_bias": window == 9, "rope_scaling": LLAMA3 if tied else None}

    ours, theirs = pair(Case("every", model_type, config))

    for side in ("left", "right"):
        ids, mask = tokens(4, 19), padding([19, 12, 4, 1], 19, side)
        with torch.no_grad():
            found, expected = ours(ids, attention_mask=mask), theirs(ids, attention_mask=mask).logits
        assert relative_difference(found[mask.bool()], expected[mask.bool()]) <= TOLERANCE

    ids, mask = tokens(4, 9), padding([9, 6, 3, 1], 9, "left")
    expected = continue_theirs(theirs, ids, attention_mask=mask, max_new_tokens=25)
    assert torch.equal(ours.generate(ids, max_new_tokens=25, attention_mask=mask), expected)
