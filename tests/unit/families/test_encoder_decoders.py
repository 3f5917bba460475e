"""Models with an encoder and a decoder, through their own calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lading import export_model
from lading.errors import ModelCheckpointMismatchError, NotSupportedError
from lading.families.nllb import NLLB, NllbConfig, get_nllb_model_hub
from lading.families.nn.transformer import EncoderDecoderCache
from lading.families.s2t_conformer import S2TConformerConfig, get_s2t_conformer_model_hub
from lading.families.s2t_transformer import S2TTransformerConfig, get_s2t_transformer_model_hub
from lading.models.family import get_family

SIZES: dict[str, Any] = {
    "model_dim": 12,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attn_heads": 2,
    "num_decoder_attn_heads": 3,
    "ffn_inner_dim": 16,
}
NLLB_CONFIG = NllbConfig(**SIZES, vocab_size=29, max_seq_len=20)
S2T_CONFIG = S2TTransformerConfig(**SIZES, target_vocab_size=29, num_fbank_channels=3, max_source_seq_len=9)
CONFORMER_CONFIG = S2TConformerConfig(
    **SIZES, target_vocab_size=29, num_fbank_channels=3, max_source_seq_len=9, depthwise_conv_kernel_size=3
)
FAMILIES = ["nllb", "s2t_conformer", "s2t_transformer"]


def create(family: str) -> Any:
    torch.manual_seed(0)
    if family == "nllb":
        return get_nllb_model_hub().create_new_model(NLLB_CONFIG).eval()
    if family == "s2t_conformer":
        return get_s2t_conformer_model_hub().create_new_model(CONFORMER_CONFIG).eval()

    return get_s2t_transformer_model_hub().create_new_model(S2T_CONFIG).eval()


def ids(n: int, length: int) -> Tensor:
    return torch.randint(4, 29, (n, length), generator=torch.Generator().manual_seed(length))


def source(family: str, length: int = 18) -> Tensor:
    if family == "nllb":
        return ids(2, length)

    return torch.randn(2, length, 3, generator=torch.Generator().manual_seed(1))


def mask(*lengths: int) -> Tensor:
    return (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model = create("nllb")
    x, target = source("nllb"), ids(2, 7)

    found = model(x, mask(18, 6), target, target_mask=mask(7, 4))

    torch.testing.assert_close(found[1:, :4], model(x[1:, :6], None, target[1:, :4]))
    torch.testing.assert_close(found[:1], model(x[:1], None, target[:1]))


@torch.no_grad()
def test_padding_on_the_left_has_no_positions() -> None:
    model = create("nllb")
    x, target = ids(1, 5), ids(1, 4)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), x), dim=1)

    found = model(padded, torch.tensor([[0] * 3 + [1] * 5]), target)

    torch.testing.assert_close(found, model(x, None, target))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_row_without_anything_is_finite(family: str) -> None:
    found = create(family)(source(family), mask(18, 0), ids(2, 3))

    assert bool(found.isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cache_gives_the_logits_of_the_whole(family: str) -> None:
    model = create(family)
    x, target, target_mask = source(family), ids(2, 8), mask(8, 8)
    target_mask[1, :2] = 0
    cache = EncoderDecoderCache()

    parts = [
        model(x, mask(18, 11), target[:, :3], target_mask=target_mask[:, :3], cache=cache),
        model(x * 0, None, target[:, 3:7], target_mask=target_mask[:, :7], cache=cache),  # the source was read
        model(x, mask(18, 11), target[:, 7:], target_mask=target_mask, cache=cache, last_only=True),
    ]

    expected = model(x, mask(18, 11), target, target_mask=target_mask)
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, 2:], expected[:, 2:])
    assert cache.num_tokens == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_generated_is_the_likeliest(family: str) -> None:
    model = create(family)
    x, first = source(family), ids(2, 2)

    found = model.generate(x, mask(18, 9), first, max_new_tokens=6)

    assert found.shape == (2, 8)
    with torch.no_grad():
        assert torch.equal(model(x, mask(18, 9), found[:, :-1])[:, 1:].argmax(-1), found[:, 2:])
    assert torch.equal(model.generate(x, mask(18, 9), first, max_new_tokens=0), first)

    end = int(found[0, 4])
    ended = model.generate(x, mask(18, 9), first, max_new_tokens=6, eos_id=[end])
    n = found[0].tolist().index(end, 2) + 1
    assert torch.equal(ended[0, :n], found[0, :n])
    assert bool((ended[0, n:] == model.spec.pad_idx).all())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source_mask": mask(7, 3)}, r"`source_mask` must be of shape \(2, 18\)"),
        ({"target_mask": mask(7, 3)}, r"`target_mask` must be of shape \(2, 5\)"),
        ({"source": torch.zeros(2, 21, dtype=torch.int64)}, "`max_source_seq_len` is 20, but .* length 21"),
        ({"target": torch.zeros(2, 21, dtype=torch.int64)}, "`max_target_seq_len` is 20, but .* length 21"),
        ({"source": torch.zeros(2, 0, dtype=torch.int64)}, "`max_source_seq_len` is 20, but .* length 0"),
    ],
)
def test_inputs_that_do_not_fit(changes: dict[str, Tensor], words: str) -> None:
    given: dict[str, Any] = {"source": source("nllb"), "source_mask": None, "target": ids(2, 5)}

    with pytest.raises(ValueError, match=words):
        create("nllb")(**given | changes)


@pytest.mark.parametrize("shape", [(2, 18), (2, 18, 4), (2, 0, 3)])
def test_filter_banks_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"filter banks \(N, S, 3\), but is of shape"):
        create("s2t_transformer")(torch.zeros(shape), None, ids(2, 5))


def test_filter_banks_that_are_too_long() -> None:
    model = create("s2t_transformer")

    model(torch.zeros(1, 36, 3), None, ids(1, 5))
    with pytest.raises(ValueError, match=r"`max_source_seq_len` is 9, but .* length 10"):
        model(torch.zeros(1, 37, 3), None, ids(1, 5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": -1}, "must not be negative"),
        ({"max_new_tokens": 19}, "has 2 tokens and `max_new_tokens` is 19"),
        ({"target": torch.zeros(2, 0, dtype=torch.int64), "max_new_tokens": 1}, "is empty"),
    ],
)
def test_generation_that_is_impossible(options: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"source": source("nllb"), "source_mask": None, "target": ids(2, 2)}

    with pytest.raises(ValueError, match=words):
        create("nllb").generate(**given | options)


def test_tables_are_one_parameter_wherever_the_model_moves() -> None:
    model: NLLB = create("nllb").to(torch.float64)

    named = model.named_parameters(remove_duplicate=False)
    tables = {id(parameter): name for name, parameter in named if parameter.shape == (29, 12)}
    assert len(tables) == 1
    assert bool((model.model.shared.weight[0] == 0).all())


def test_dropout_is_of_training_only() -> None:
    model = create("nllb")
    x, target = source("nllb"), ids(2, 5)

    assert torch.equal(model(x, None, target), model(x, None, target))
    model.train()
    assert not torch.equal(model(x, None, target), model(x, None, target))


# --- checkpoints


def fairseq(state: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {name.removeprefix("model."): tensor for name, tensor in state.items() if name != "model.shared.weight"}
    named["decoder.output_projection.weight"] = named.pop("lm_head.weight")

    return named


def test_the_index_of_padding_says_the_order_of_the_first_symbols(tmp_path: Path, home: Path) -> None:
    state = create("nllb").state_dict()
    torch.save({"model": fairseq(state)}, tmp_path / "model.pt")
    table = state["model.shared.weight"]
    hub = get_nllb_model_hub()

    ours = hub.load_custom_model(tmp_path / "model.pt", NLLB_CONFIG, progress=False)
    theirs = hub.load_custom_model(tmp_path / "model.pt", replace(NLLB_CONFIG, pad_idx=1), progress=False)

    assert torch.equal(ours.model.shared.weight, table[[1, 3, 0, 2, *range(4, 29)]])
    assert torch.equal(theirs.model.shared.weight, table)


def save_with_a_row_too_many(path: Path, config: NllbConfig) -> Tensor:
    """A checkpoint of fairseq; returns its table."""
    state = get_nllb_model_hub().create_new_model(replace(config, vocab_size=config.vocab_size + 1)).state_dict()
    torch.save({"model": fairseq(state)}, path)

    return state["model.shared.weight"]


def test_tables_of_nllb_100_have_a_row_too_many(tmp_path: Path, home: Path) -> None:
    config = replace(NLLB_CONFIG, vocab_size=256_102, model_dim=6)
    table = save_with_a_row_too_many(tmp_path / "model.pt", config)

    model = get_nllb_model_hub().load_custom_model(tmp_path / "model.pt", config, progress=False)

    assert torch.equal(model.model.shared.weight[4:], table[4:-1])
    assert torch.equal(model.model.shared.weight[:4], table[[1, 3, 0, 2]])


def test_a_row_too_many_in_other_tables_is_refused(tmp_path: Path, home: Path) -> None:
    save_with_a_row_too_many(tmp_path / "model.pt", NLLB_CONFIG)

    with pytest.raises(ModelCheckpointMismatchError, match="problem") as error:
        get_nllb_model_hub().load_custom_model(tmp_path / "model.pt", NLLB_CONFIG, progress=False)
    assert any("[30, 12]" in problem and "[29, 12]" in problem for problem in error.value.problems)


def test_tables_that_differ_are_refused(tmp_path: Path, home: Path) -> None:
    state = fairseq(create("nllb").state_dict())
    state["decoder.output_projection.weight"] = state["decoder.output_projection.weight"] + 1
    torch.save({"model": state}, tmp_path / "model.pt")

    with pytest.raises(ModelCheckpointMismatchError, match="holds different values for them"):
        get_nllb_model_hub().load_custom_model(tmp_path / "model.pt", NLLB_CONFIG, progress=False)


@pytest.mark.parametrize(
    ("family", "keys", "words"),
    [
        ("nllb", {"pad_token_id": 0}, "pad_token_id is 0"),
        ("nllb", {"scale_embedding": False}, "scale_embedding is False"),
        ("nllb", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("nllb", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("s2t_transformer", {"conv_kernel_sizes": [5, 3]}, r"conv_kernel_sizes is \[5, 3\]"),
        ("s2t_transformer", {"conv_channels": 512}, "conv_channels is 512"),
    ],
)
def test_files_of_models_that_are_not_supported(family: str, keys: dict[str, object], words: str) -> None:
    from_hf = get_family(family).from_hf
    assert from_hf is not None

    with pytest.raises(NotSupportedError, match=words):
        from_hf(keys)


def test_stacks_of_different_inner_widths_are_refused() -> None:
    from_hf = get_family("nllb").from_hf
    assert from_hf is not None

    with pytest.raises(ModelCheckpointMismatchError, match="decoder_ffn_dim is expected to be the encoder_ffn_dim"):
        from_hf({"encoder_ffn_dim": 16, "decoder_ffn_dim": 32})


def test_a_vocabulary_in_the_order_of_fairseq2_has_no_form_of_transformers(tmp_path: Path) -> None:
    with pytest.raises(NotSupportedError, match="its `pad_idx` is 0"):
        export_model(create("nllb"), get_family("nllb"), NLLB_CONFIG, tmp_path / "out")
