"""Models of transformers that ranks hold together compute what one process computes alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from lading.errors import NotSupportedError
from lading.families.hg import HuggingFaceModelConfig, get_hg_model_hub
from lading.gangs import create_gangs
from tests.distributed.tiny_models import save_model, whole
from tests.distributed.workers import Pool

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 64}

BLIP_2: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8,
        "patch_size": 4,
    },
    "qformer_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "encoder_hidden_size": 32, "vocab_size": 64,
    },
    "text_config": {
        "model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "vocab_size": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 16,
    },
    "num_query_tokens": 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers

    root = tmp_path_factory.mktemp("hg")
    for name, config, kls in (
        ("qwen3", transformers.Qwen3Config(**SIZES, tie_word_embeddings=True), transformers.Qwen3ForCausalLM),
        ("phi", transformers.PhiConfig(**SIZES), transformers.PhiForCausalLM),
        ("mixtral", transformers.MixtralConfig(**SIZES, num_local_experts=4), transformers.MixtralForCausalLM),
        ("gpt2", transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64), transformers.GPT2LMHeadModel),
        ("t5", transformers.T5Config(**T5), transformers.T5ForConditionalGeneration),
        ("blip2", transformers.Blip2Config(**BLIP_2), transformers.Blip2ForConditionalGeneration),
    ):
        save_model(root / name, kls, config, max_shard_size="30KB")

    return {path.name: path for path in root.iterdir()}


def load_and_compare(folder: Path, tp: int, sdp: int) -> tuple[list[str], int]:
    """Everything in which the two differ, and how many parameters are split."""
    torch.set_num_threads(1)
    config = HuggingFaceModelConfig(model_type="causal_lm")
    found = []
    with warnings.catch_warnings(), create_gangs("cpu", tp=tp, sdp=sdp) as gangs:
        warnings.simplefilter("error")
        hub = get_hg_model_hub()
        alone = hub.load_custom_model(folder, config, device="cpu", dtype=torch.float32, progress=False).eval()
        model = hub.load_custom_model(folder, config, gangs=gangs, dtype=torch.float32, progress=False).eval()

        expected = dict(alone.named_parameters(remove_duplicate=False))
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not torch.equal(whole(parameter.detach()), expected[name]):
                found.append(f"parameter {name}")
        for (name, buffer), (_, own) in zip(model.named_buffers(), alone.named_buffers(), strict=True):
            if not torch.equal(buffer, own):
                found.append(f"buffer {name}")

        ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
        logits, reference = model(ids).logits, alone(ids).logits
        if not torch.allclose(logits, reference, rtol=1e-4, atol=1e-4 * float(reference.detach().abs().max())):
            found.append("logits")
        logits.square().mean().backward()
        reference.square().mean().backward()
        for name, parameter in model.named_parameters():
            gradient, own = expected[name].grad, parameter.grad
            if gradient is None or own is None or not torch.allclose(whole(own), gradient, rtol=1e-4, atol=1e-4):
                found.append(f"gradient of {name}")

        split = sum(isinstance(p, DTensor) and not p.placements[0].is_replicate() for p in model.parameters())

        return found, split


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("name", "tp", "sdp", "split"),
    [
        ("qwen3", 2, 1, 15),  # all but the norms; embeddings and head are one
        pytest.param("phi", 2, 1, 23, marks=pytest.mark.slow),
        ("mixtral", 2, 1, 10),  # experts stay whole
        ("gpt2", 2, 1, 0),  # transformers has no plan for it
        pytest.param("qwen3", 1, 2, 24, marks=pytest.mark.slow),
        ("gpt2", 1, 2, 28),
    ],
)
def test_two_ranks(pool2: Pool, folders: dict[str, Path], name: str, tp: int, sdp: int, split: int) -> None:
    for found in pool2.values(load_and_compare, folders[name], tp, sdp):
        assert found == ([], split)


def test_sizes_that_do_not_divide_raise_before_anything_is_read(pool4: Pool, folders: dict[str, Path]) -> None:
    for outcome in pool4.run(load_and_compare, folders["qwen3"], 4, 1):
        assert isinstance(outcome.error, NotSupportedError)
        assert "`num_key_value_heads` is 2" in str(outcome.error)


def load_in_half_precision(folder: Path) -> tuple[list[str], set[str]]:
    """Everything in which a sharded model differs from one on a device alone, and what is in float32."""
    torch.set_num_threads(1)
    with warnings.catch_warnings(), create_gangs("cpu", sdp=2) as gangs:
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # T5's blocks return views
        hub = get_hg_model_hub()
        alone = hub.load_model(folder, device="cpu", dtype=torch.float16, progress=False).eval()
        model = hub.load_model(folder, gangs=gangs, dtype=torch.float16, progress=False).eval()

        expected = dict(alone.named_parameters())
        held = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
        found = [name for name, own in held.items() if own.dtype != expected[name].dtype]
        found += [name for name, own in held.items() if not torch.equal(own, expected[name])]
        ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
        logits, reference = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, alone))
        if not torch.allclose(logits, reference, rtol=1e-2, atol=1e-2):
            found.append("logits")
        logits.float().square().mean().backward()
        found += [name for name, parameter in model.named_parameters() if parameter.grad is None]

        return found, {name for name, own in held.items() if own.dtype == torch.float32}


def test_what_is_kept_in_float32_is_sharded_by_itself(pool2: Pool, folders: dict[str, Path]) -> None:
    for found, kept in pool2.values(load_in_half_precision, folders["t5"]):
        assert found == []
        assert len(kept) == 4
        assert all(name.endswith(".wo.weight") for name in kept)


def load_a_part_in_float32(folder: Path) -> tuple[list[str], set[str]]:
    """Everything in which the parameters of a sharded model differ from those of one on a device alone, and the first
    parts of the names of what is in float32.
    """
    torch.set_num_threads(1)
    with create_gangs("cpu", sdp=2) as gangs:
        hub = get_hg_model_hub()
        alone = dict(hub.load_model(folder, device="cpu", dtype=torch.float16, progress=False).named_parameters())
        model = hub.load_model(folder, gangs=gangs, dtype=torch.float16, progress=False)
        held = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}

        return (
            [name for name, own in held.items() if own.dtype != alone[name].dtype or not torch.equal(own, alone[name])],
            {name.partition(".")[0] for name, own in held.items() if own.dtype == torch.float32},
        )


def test_a_part_that_is_kept_in_float32_may_have_layers_that_are_gathered_by_themselves(
    pool2: Pool, folders: dict[str, Path]
) -> None:
    for found, kept in pool2.values(load_a_part_in_float32, folders["blip2"]):
        assert found == ["query_tokens"]  # beside parameters of the model's dtype, with which it is gathered
        assert kept == {"qformer"}
