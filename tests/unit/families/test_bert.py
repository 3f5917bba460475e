from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import init

from lading.errors import ModelCheckpointMismatchError, NotSupportedError
from lading.families.bert import FAMILY, Bert, BertConfig
from lading.models.family import get_family
from lading.planning.rules import route

CONFIG = BertConfig(
    model_dim=24,
    max_seq_len=16,
    vocab_size=30,
    num_layers=2,
    num_attn_heads=3,
    ffn_inner_dim=40,
)

MINILM = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 384,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 6,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.8.2",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}


def make(config: BertConfig = CONFIG) -> Bert:
    torch.manual_seed(0)
    model = FAMILY.build(config)
    for name, parameter in model.named_parameters():
        FAMILY.init(model, replace(config, init_std=0.3), name, parameter)

    return model.eval()


def ids(n: int, s: int) -> torch.Tensor:
    return torch.randint(1, CONFIG.vocab_size, (n, s), generator=torch.Generator().manual_seed(1))


def test_it_is_registered() -> None:
    assert get_family("bert") is FAMILY


def test_names() -> None:
    names = list(FAMILY.build(replace(CONFIG, num_layers=1)).state_dict())

    assert [name for name in names if name.endswith("weight")] == [
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        "embeddings.LayerNorm.weight",
        "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.0.attention.self.key.weight",
        "encoder.layer.0.attention.self.value.weight",
        "encoder.layer.0.attention.output.dense.weight",
        "encoder.layer.0.attention.output.LayerNorm.weight",
        "encoder.layer.0.intermediate.dense.weight",
        "encoder.layer.0.output.dense.weight",
        "encoder.layer.0.output.LayerNorm.weight",
        "pooler.dense.weight",
    ]


# --- the model


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model = make()
    tokens = ids(2, 7)
    padded = torch.cat((tokens, torch.zeros(2, 4, dtype=torch.long)), dim=1)
    mask = torch.tensor([[1] * 7 + [0] * 4] * 2)

    torch.testing.assert_close(model(padded, attention_mask=mask)[:, :7], model(tokens), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode(padded, mask), model.encode(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@torch.no_grad()
def test_embeddings_of_sentences(normalize: bool) -> None:
    mean = make(replace(CONFIG, pooling="mean", normalize=normalize))
    first = make(replace(CONFIG, pooling="cls", normalize=normalize))
    tokens, mask = ids(2, 7), torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    hidden = mean(tokens, attention_mask=mask)

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=1, keepdim=True) if normalize else x

    torch.testing.assert_close(
        mean.encode(tokens, mask), scaled(torch.stack((hidden[0].mean(0), hidden[1, :3].mean(0))))
    )
    torch.testing.assert_close(first.encode(tokens, mask), scaled(hidden[:, 0]))


@torch.no_grad()
def test_a_sentence_of_padding_alone_has_no_direction() -> None:
    embedding = make().encode(ids(1, 4), torch.zeros(1, 4))

    assert torch.equal(embedding, torch.zeros(1, 24))


@torch.no_grad()
def test_token_types_matter() -> None:
    model = make()

    assert not torch.allclose(
        model.encode(ids(1, 7)), model.encode(ids(1, 7), token_type_ids=torch.ones(1, 7, dtype=torch.long))
    )


def test_what_a_model_was_made_without() -> None:
    with pytest.raises(NotSupportedError, match="`pooling`"):
        make(replace(CONFIG, pooling="none")).encode(ids(1, 4))

    model = make(replace(CONFIG, pooler=False))
    with pytest.raises(NotSupportedError, match="`pooler`"):
        model.pooled_output(model(ids(1, 4)))


def test_too_many_tokens() -> None:
    with pytest.raises(ValueError, match=r"max_seq_len.*16.*17 tokens"):
        make()(ids(1, 17))


def test_a_mask_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4\)"):
        make()(ids(1, 4), attention_mask=torch.ones(1, 5))


@pytest.mark.parametrize("field", ["dropout_p", "attn_dropout_p"])
def test_dropout_is_a_matter_of_training(field: str) -> None:
    model = make(replace(CONFIG, **{"dropout_p": 0.0, "attn_dropout_p": 0.0, field: 0.5}))
    tokens = ids(1, 9)

    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_random_weights() -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, model_dim=240, ffn_inner_dim=400, vocab_size=500)
    model = FAMILY.build(config)
    for name, parameter in model.named_parameters():
        init.constant_(parameter, torch.nan)
        FAMILY.init(model, config, name, parameter)

    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "LayerNorm" in name:
            assert (parameter == 1).all(), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.15), name
    assert (model.embeddings.word_embeddings.weight[0] == 0).all()


# --- checkpoints


def test_a_published_file() -> None:
    assert FAMILY.from_hf(MINILM) == BertConfig(model_dim=384, num_layers=6, ffn_inner_dim=1536)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method is 'awq'"),
    ],
)
def test_what_would_change_the_result_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NotSupportedError, match=message):
        FAMILY.from_hf(MINILM | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "384"}, "hidden_size is expected to be a positive integer, but is '384'"),
        ({"num_attention_heads": 7}, "multiple of `num_attn_heads`"),
        ({"layer_norm_eps": 0.0}, "norm_eps"),
        ({"hidden_dropout_prob": 1.5}, "dropout_p"),
        ({"pad_token_id": 30522}, "pad_idx"),
        ({"hidden_act": None}, "hidden_act is expected to be a string, but is None"),
    ],
)
def test_nonsense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelCheckpointMismatchError, match=message):
        FAMILY.from_hf(MINILM | changes)


def old_names(names: list[str]) -> list[str]:
    return [n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for n in names]


HEADS = ["cls.predictions.bias", "cls.predictions.transform.LayerNorm.gamma", "cls.seq_relationship.weight"]


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("old", [False, True])
def test_names_of_checkpoints(prefix: str, old: bool) -> None:
    targets = list(FAMILY.build(CONFIG).state_dict())
    names = [prefix + name for name in (old_names(targets) if old else targets)]

    routed = route([*names, f"{prefix}embeddings.position_ids", *HEADS], targets, FAMILY.rules(CONFIG))

    assert not routed.missing
    assert not routed.unexpected
    assert not routed.clashes
    assert list(routed.tensors) == list(range(len(targets)))


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_pooler_that_is_not_wanted(prefix: str) -> None:
    names = [prefix + name for name in FAMILY.build(CONFIG).state_dict()]
    config = replace(CONFIG, pooler=False)

    routed = route(names, list(FAMILY.build(config).state_dict()), FAMILY.rules(config))

    assert not routed.missing
    assert not routed.unexpected


def test_what_the_names_of_a_checkpoint_suggest() -> None:
    assert FAMILY.explain is not None
    missing = ["pooler.dense.weight", "pooler.dense.bias"]

    without = FAMILY.explain(missing, [])
    assert without is not None
    assert "pooler: false" in without
    task = FAMILY.explain([], ["classifier.weight", "classifier.bias"])
    assert task is not None
    assert "get_hg_model_hub()" in task
    assert FAMILY.explain([*missing, "encoder.layer.0.output.dense.bias"], []) is None
    assert FAMILY.explain([], ["extra"]) is None


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
        FAMILY.build(replace(CONFIG, **changes))
