"""What ranks compute together is what one process computes alone, over real processes."""

from __future__ import annotations

import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Module

from lading.cards.card import AssetCard
from lading.catalog.store import get_asset_store
from lading.errors import GangError, NotSupportedError
from lading.gangs import Gangs, create_fake_gangs, create_gangs
from lading.models.construct import create_model
from lading.models.hf_config import family_of_folder
from lading.models.hub import ModelHub, load_model
from lading.operations.export import export_model
from tests.distributed.tiny_models import far, save_model, whole
from tests.distributed.workers import Pool
from tests.helpers.make_checkpoint import make

Axes = tuple[int, int, int]
"""tp, sdp, rdp."""

# Vocabulary, keys and values of this LLaMA do not divide by 4 along dim 0, its other parameters not by 8.
LLAMA = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "vocab_size": 101,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}
MISTRAL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 96,
    "sliding_window": 5,
    "tie_word_embeddings": False,
}
OLMO = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "pad_token_id": 0,
    "eos_token_id": 1,
}
GEMMA = {
    "hidden_size": 36,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "vocab_size": 101,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
LLAMA4 = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 101,
    "num_local_experts": 8,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 4,
    "floor_scale": 3,
}
GEMMA_3N = GEMMA | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.9],
    "laurel_rank": 6,
    "vocab_size_per_layer_input": 95,
    "hidden_size_per_layer_input": 6,
}
BERT = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 8, "vocab_size": 102}
SIZES: dict[str, dict[str, Any]] = {
    "llama": LLAMA, "mistral": MISTRAL, "olmo": OLMO, "gemma": GEMMA, "gemma3n": GEMMA_3N, "llama4": LLAMA4,
    "bert": BERT,
}  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers

    root = tmp_path_factory.mktemp("models")
    made = {"qwen": make(root / "qwen", shards=2, num_attention_heads=4)}
    for name, config, kls in (
        ("llama", transformers.LlamaConfig, transformers.LlamaForCausalLM),
        ("mistral", transformers.MistralConfig, transformers.MistralForCausalLM),
        ("olmo", transformers.Olmo3Config, transformers.Olmo3ForCausalLM),
        ("gemma", transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
        ("llama4", transformers.Llama4TextConfig, transformers.Llama4ForCausalLM),
        ("gemma3n", transformers.Gemma3nTextConfig, transformers.Gemma3nForCausalLM),
        ("bert", transformers.BertConfig, transformers.BertModel),
    ):
        sizes = SIZES[name]
        values = config(**{"num_hidden_layers": 2, "max_position_embeddings": 64, **sizes})
        made[name] = save_model(root / name, kls, values)

    return made


def differences(model: Module, alone: Module) -> list[str]:
    """Everything in which a model of this gang differs from one of a single process."""
    found = []
    expected = dict(alone.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        full = whole(parameter.detach())
        if full.shape != expected[name].shape or not torch.equal(full, expected[name]):
            found.append(f"parameter {name}")
    if hasattr(model, "lm_head"):
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        if tied != (alone.lm_head.weight is alone.model.embed_tokens.weight):
            found.append("ties")

    ids = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for options in ({}, {"attention_mask": mask}):
        logits, reference = model(ids, **options), alone(ids, **options)
        if far(logits, reference):
            found.append(f"logits with {list(options)} by {float((logits - reference).abs().max())}")
    logits.square().mean().backward()
    reference.square().mean().backward()
    for name, parameter in model.named_parameters():
        gradient = expected[name].grad
        if (gradient is None) != (parameter.grad is None):
            found.append(f"presence of the gradient of {name}")
        elif gradient is not None and parameter.grad is not None and far(whole(parameter.grad), gradient):
            found.append(f"gradient of {name}")

    if hasattr(model, "encode"):
        with torch.no_grad():
            if far(model.encode(ids, mask), alone.encode(ids, mask)):
                found.append("embeddings of sentences")
            if far(model.pooled_output(model(ids)), alone.pooled_output(alone(ids))):
                found.append("what the pooler gives")
    if hasattr(model, "generate"):
        prompt = ids[:, :4]
        if not torch.equal(model.generate(prompt, max_new_tokens=5), alone.generate(prompt, max_new_tokens=5)):
            found.append("what is generated")

    return found


def gangs_of(axes: Axes) -> Gangs:
    tp, sdp, _ = axes
    return create_gangs("cpu", tp=tp, sdp=sdp)


def load_and_compare(folder: Path, axes: Axes) -> list[str]:
    torch.set_num_threads(1)
    with warnings.catch_warnings(), gangs_of(axes) as gangs:
        warnings.simplefilter("error")
        assert gangs.rdp.size == axes[2]
        alone = load_model(folder, device="cpu", dtype=torch.float32, progress=False).eval()
        model = load_model(folder, gangs=gangs, dtype=torch.float32, progress=False).eval()

        return differences(model, alone)


def compare(pool: Pool, folder: Path, axes: Axes) -> None:
    assert pool.values(load_and_compare, folder, axes) == [[]] * pool.size


def case_id(value: Any) -> str:
    return value if isinstance(value, str) else "tp{}-sdp{}-rdp{}".format(*value)


FAMILIES = ["llama", "qwen", "mistral", "olmo", "gemma", "gemma3n", "llama4", "bert"]


def slow(*cases: tuple[str, Axes]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("family", "axes"),
    [
        *((family, (2, 1, 1)) for family in FAMILIES),
        ("qwen", (1, 2, 1)),
        ("gemma3n", (1, 2, 1)),
        ("bert", (1, 2, 1)),
        *slow(*((family, (1, 2, 1)) for family in ("llama", "mistral", "olmo", "gemma", "llama4"))),
    ],
    ids=case_id,
)
def test_two_ranks(pool2: Pool, folders: dict[str, Path], family: str, axes: Axes) -> None:
    compare(pool2, folders[family], axes)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("llama", (4, 1, 1)),  # one key/value head, which all ranks share
        ("llama", (2, 2, 1)),  # a vocabulary that tensor parallelism splits unevenly
        ("mistral", (4, 1, 1)),  # two ranks to a key/value head
        ("qwen", (1, 2, 2)),
        ("bert", (2, 1, 2)),
        *slow(
            ("llama", (1, 4, 1)),
            *((family, (2, 2, 1)) for family in ("qwen", "olmo", "gemma", "gemma3n", "llama4", "bert")),
        ),
    ],
    ids=case_id,
)
def test_four_ranks(pool4: Pool, folders: dict[str, Path], family: str, axes: Axes) -> None:
    compare(pool4, folders[family], axes)


@pytest.fixture(scope="module")
def pool8() -> Any:
    with Pool(8) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [a for a in itertools.product([1, 2, 4, 8], repeat=3) if a[0] * a[1] * a[2] == 8], ids=case_id
)
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_ranks(pool8: Pool, folders: dict[str, Path], family: str, axes: Axes) -> None:
    if axes[0] == 8 and family in ("llama", "qwen", "gemma", "gemma3n", "llama4"):
        outcomes = pool8.run(load_and_compare, folders[family], axes)
        assert all(isinstance(o.error, NotSupportedError) and "num_attn_heads" in str(o.error) for o in outcomes)
    else:
        compare(pool8, folders[family], axes)


def new_and_compare(folder: Path, axes: Axes) -> list[str]:
    torch.set_num_threads(1)
    family, config = family_of_folder(folder)
    rank = int(os.environ["RANK"])
    torch.manual_seed(7)
    alone = create_model(family, config, gangs=create_fake_gangs("cpu"), dtype=torch.float32, meta=False).eval()
    torch.manual_seed(7 + rank)  # the first rank's seed counts
    state = torch.get_rng_state()
    with gangs_of(axes) as gangs:
        model = create_model(family, config, gangs=gangs, dtype=torch.float32, meta=False).eval()
        assert not torch.equal(torch.get_rng_state(), state)

        return differences(model, alone)


def new_but_another_on_rank_1(folder: Path) -> None:
    family, config = family_of_folder(folder)
    with gangs_of((2, 1, 1)) as gangs:
        if gangs.root.rank == 1:
            config.num_layers += 1
        ModelHub(family, None).create_new_model(config, gangs=gangs)  # type: ignore[arg-type]


def test_ranks_that_ask_for_different_models(pool2: Pool, folders: dict[str, Path]) -> None:
    for outcome in pool2.run(new_but_another_on_rank_1, folders["qwen"]):
        assert isinstance(outcome.error, GangError)
        assert "num_layers" in str(outcome.error)


@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("bert", (2, 2, 1)),
        *slow(("qwen", (2, 2, 1)), ("llama4", (2, 2, 1)), ("gemma3n", (2, 2, 1)), ("llama", (1, 4, 1))),
    ],
    ids=case_id,
)
def test_a_new_model(pool4: Pool, folders: dict[str, Path], family: str, axes: Axes) -> None:
    assert pool4.values(new_and_compare, folders[family], axes) == [[]] * 4


def ask_for(kind: str, folder: Path, other: Path, home: str) -> None:
    """Ask on rank 0 for one model, on rank 1 for another."""
    os.environ |= {"LADING_DATABASE_URL": f"sqlite:///{home}/c.sqlite", "XDG_CONFIG_HOME": home, "LADING_OFFLINE": "1"}
    family, config = family_of_folder(folder)
    hub = ModelHub(family, get_asset_store())
    with create_gangs("cpu", ep=2) if kind == "tensors over ep" else gangs_of((2, 1, 1)) as gangs:
        second = gangs.root.rank == 1
        mine = other if second else folder
        if kind == "names":
            load_model("second" if second else "first", gangs=gangs)
        elif kind == "cards":
            load_model(AssetCard("first", {"checkpoint": str(mine), "model_family": family.name}), gangs=gangs)
        elif kind == "paths":
            load_model(mine, gangs=gangs)
        elif kind == "paths with a configuration":
            hub.load_custom_model(mine, config, gangs=gangs)
        elif kind == "configurations":
            config.max_seq_len += second
            load_model(folder, config=config, gangs=gangs)
        elif kind == "families":
            load_model("first", gangs=gangs) if second else hub.load_model("first", gangs=gangs)
        elif kind.startswith("tensors"):
            list(hub.iter_checkpoint(mine, config, gangs=gangs))
        else:
            model = hub.create_new_model(config, gangs=gangs)
            export_model(model, family, config, f"{home}/exported", gangs=gangs, beside=mine)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("kind", "both"),
    [
        ("names", ("'first'", "'second'")),
        ("cards", ("model is 'the card first with",)),
        ("paths", ("{folder}", "{other}")),
        ("paths with a configuration", ("{folder}", "{other}")),
        ("configurations", ("config.max_seq_len is",)),
        ("families", ("'qwen'", "None")),
        ("tensors", ("{folder}", "{other}")),
        ("tensors over ep", ("{folder}", "{other}")),
        ("export", ("{folder}", "{other}")),
    ],
)
def test_ranks_with_different_arguments_raise_errors_that_name_both(
    pool2: Pool, home: Path, tmp_path: Path, kind: str, both: tuple[str, ...]
) -> None:
    folder, other = make(tmp_path / "one"), make(tmp_path / "two")
    for outcome in pool2.run(ask_for, kind, folder, other, str(home)):
        assert isinstance(outcome.error, GangError), outcome.trace
        for part in both:
            assert part.format(folder=folder, other=other) in str(outcome.error)
    assert not (home / "exported").exists()
