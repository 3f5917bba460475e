"""The family of any model of transformers: what it takes from ``config.json``, what it refuses, and its rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lading import load_model
from lading.errors import AssetCardError, ModelCheckpointMismatchError, NotSupportedError, PolicyError
from lading.families.hg import FAMILY, HuggingFaceModelConfig, get_hg_model_hub
from lading.families.hg.outline import outline
from lading.families.hg.rules import rules_of
from lading.gangs import create_fake_gangs
from lading.models.construct import build_on_meta, create_model
from lading.models.family import family_of_model_type
from lading.models.hf_config import family_of_folder
from lading.models.parallel_plan import Split
from lading.models.targets import targets_of
from lading.planning.composition import Joined, Regroup, Reordered, Sliced
from lading.planning.rules import Rule, rename, route
from tests.helpers.interpreters import Interpreters

GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 64,
}
DECODER: dict[str, Any] = {
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


def config(values: dict[str, Any] = GPT2, **fields: Any) -> HuggingFaceModelConfig:
    return HuggingFaceModelConfig(hf_config=values, **fields)


# --- the configuration -----------------------------------------------------------------------------------------------


def test_native_families_come_first() -> None:
    assert family_of_model_type("qwen3").name == "qwen"  # type: ignore[union-attr]
    assert family_of_model_type("gpt2") is FAMILY
    assert family_of_model_type("no_such_type") is FAMILY


def test_a_folder_says_its_class(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2))

    family, found = family_of_folder(tmp_path)

    assert family is FAMILY
    assert found == HuggingFaceModelConfig(model_type="custom", custom_model_class="GPT2LMHeadModel", hf_config=GPT2)


def test_the_family_can_be_asked_for_where_another_reads_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **DECODER}))

    assert family_of_folder(tmp_path)[0].name == "qwen"
    assert family_of_folder(tmp_path, FAMILY)[0] is FAMILY


def test_without_architectures_it_is_the_bare_model() -> None:
    found = FAMILY.from_hf({key: value for key, value in GPT2.items() if key != "architectures"})

    assert found.model_type == "auto"
    assert type(build_on_meta(FAMILY, found)).__name__ == "GPT2Model"


@pytest.mark.parametrize(
    ("fields", "kls"),
    [
        ({}, "GPT2Model"),
        ({"model_type": "causal_lm"}, "GPT2LMHeadModel"),
        ({"model_type": "custom"}, "GPT2LMHeadModel"),
        ({"model_type": "custom", "custom_model_class": "GPT2DoubleHeadsModel"}, "GPT2DoubleHeadsModel"),
        ({"trust_remote_code": True}, "GPT2Model"),
    ],
)
def test_the_class(fields: dict[str, Any], kls: str) -> None:
    module = build_on_meta(FAMILY, config(**fields))

    assert type(module).__name__ == kls
    assert type(module).__module__ == "transformers.models.gpt2.modeling_gpt2"
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_what_a_card_states_is_laid_over_what_is_beside_the_checkpoint() -> None:
    stated = HuggingFaceModelConfig(model_type="causal_lm", hf_config={"n_layer": 1})

    assert FAMILY.complete is not None
    found = FAMILY.complete(stated, GPT2)

    assert found.hf_config == GPT2 | {"n_layer": 1}
    assert FAMILY.complete(found, GPT2) == found
    assert len(build_on_meta(FAMILY, found).transformer.h) == 1  # type: ignore[union-attr, arg-type]


def test_gradient_checkpointing() -> None:
    assert build_on_meta(FAMILY, config(enable_gradient_checkpointing=True)).h[0].gradient_checkpointing  # type: ignore[union-attr, index]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        (GPT2 | {"model_type": "their_own", "auto_map": {"AutoModel": "modeling.Theirs"}}, {}),
        (GPT2 | {"model_type": "their_own"}, {"trust_remote_code": True}),
        (GPT2 | {"auto_map": {"AutoModel": "m.Theirs"}}, {"model_type": "custom", "custom_model_class": "Theirs"}),
    ],
)
def test_code_of_a_repository_is_refused(values: dict[str, Any], fields: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="never runs"):
        build_on_meta(FAMILY, config(values, **fields))


def test_code_of_a_repository_is_not_looked_at_where_transformers_has_the_model(tmp_path: Path) -> None:
    """Nor are kernels fetched that a configuration names."""
    import transformers

    values = GPT2 | {
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
        "_attn_implementation": "somebody/kernels",
        "attn_implementation": "somebody/kernels",
        "experts_implementation": "somebody/kernels",
    }
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "theirs.py").write_text("raise SystemExit('run')")

    model = load_model(tmp_path)

    assert type(model) is transformers.GPT2LMHeadModel
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "auto_map")


@pytest.mark.parametrize(
    ("values", "fields", "message"),
    [
        ({}, {}, "the file does not exist"),
        ({"model_type": "no_such"}, {}, "'no_such'"),
        ({"model_type": 3}, {}, "3"),
        (GPT2, {"model_type": "seq2seq_lm"}, "AutoModelForSeq2SeqLM"),
        (GPT2, {"model_type": "custom", "custom_model_class": "NoSuchModel"}, "NoSuchModel"),
        (GPT2, {"model_type": "custom", "custom_model_class": "pipeline"}, "'pipeline'"),
        (GPT2, {"model_type": "custom", "custom_model_class": "models.gpt2"}, "'models.gpt2'"),
        (GPT2, {"model_type": "custom", "custom_model_class": "BertModel"}, "BertConfig"),
    ],
)
def test_what_transformers_does_not_have(values: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises((NotSupportedError, ModelCheckpointMismatchError), match=message):
        build_on_meta(FAMILY, config(values, **fields))


@pytest.mark.parametrize("changes", [{"n_embd": "wide"}, {"n_head": 5}, {"n_layer": {}}])
def test_sizes_that_make_no_model(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelCheckpointMismatchError, match=r"config\.json"):
        build_on_meta(FAMILY, config(GPT2 | changes))


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"n_layer": 10**9}, "10000 layers"),
        ({"part": [{"encoder_layers": 10**9}]}, "10000 layers"),
        ({"depths": [2, 10**9]}, "10000 layers"),
        ({"num_labels": 10**9}, "1000000 labels"),
        ({"vision_config": {"num_labels": 10**9}}, "1000000 labels"),
    ],
)
def test_more_objects_than_the_memory_holds(changes: dict[str, Any], most: str) -> None:
    """Modules and names cost memory also where parameters have none."""
    with pytest.raises(ModelCheckpointMismatchError, match=f"which is 1000000000, is more than the {most}"):
        build_on_meta(FAMILY, config(GPT2 | changes))


@pytest.mark.parametrize("top", [{"__float__": "Infinity"}, float("inf")])
def test_numbers_that_json_does_not_have(top: object) -> None:
    values = {"model_type": "mamba2", "time_step_limit": [0.0, top], "hidden_size": 32, "num_heads": 8, "head_dim": 8}

    model: Any = build_on_meta(FAMILY, config(values | {"num_hidden_layers": 1, "vocab_size": 64}))

    assert list(model.config.time_step_limit) == [0.0, float("inf")]


@pytest.mark.parametrize(
    ("model_type", "stated", "kls"),
    [
        ("internlm3", "InternLM3ForCausalLM", "LlamaForCausalLM"),
        ("iquestcoder", "IQuestCoderForCausalLM", "LlamaForCausalLM"),
        ("iquestcoder", "IQuestCoderModel", "LlamaModel"),
        ("iquestcoder", "LlamaForCausalLM", "LlamaForCausalLM"),
        ("llama4", "Llama4ForCausalLM", "Llama4ForCausalLM"),  # of the part of it that is about text
    ],
)
def test_types_that_share_the_class_of_another(model_type: str, stated: str, kls: str) -> None:
    """Their files name a class of their repository, which transformers has under another name."""
    values = {"model_type": model_type, "architectures": [stated], "auto_map": {"AutoModelForCausalLM": "m.Y"}}
    text = DECODER | {"intermediate_size_mlp": 48, "num_local_experts": 2}
    sizes = {"text_config": text} if model_type == "llama4" else DECODER

    family_config = FAMILY.from_hf(values | sizes)  # type: ignore[misc]

    assert type(build_on_meta(FAMILY, family_config)).__name__ == kls


def test_a_type_with_a_class_of_its_own_does_not_stand_for_code_of_a_repository() -> None:
    values = GPT2 | {"architectures": ["GPT2ForEverything"], "auto_map": {"AutoModel": "m.GPT2ForEverything"}}

    with pytest.raises(PolicyError, match="never runs"):
        build_on_meta(FAMILY, config(values, model_type="custom"))


def test_without_transformers(tmp_path: Path, interpreters: Interpreters) -> None:
    """In a process where it cannot be imported, all else works, and the error says what to install."""
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    script = f"""
import sys
sys.modules["transformers"] = None
from pathlib import Path
from lading.errors import NotSupportedError
from lading.models.family import family_of_model_type
from lading.models.hf_config import family_of_folder
assert family_of_model_type("qwen3").name == "qwen"
try:
    family_of_folder(Path({str(tmp_path)!r}))
except NotSupportedError as error:
    print(error)
"""
    assert "`pip install 'lading-hub[hf]'`" in interpreters.run(script)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("__version__ = '4.57.1'", "transformers 5, but version 4.57.1 is installed"),
        ("import nowhere_at_all", "cannot be imported: No module named 'nowhere_at_all'"),
    ],
    ids=["older", "broken"],
)
def test_with_a_transformers_that_cannot_make_it(
    tmp_path: Path, interpreters: Interpreters, content: str, told: str
) -> None:
    """An environment may have had it before lading came without the extra."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(content)
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from lading.errors import NotSupportedError
from lading.families.hg import FAMILY
try:
    FAMILY.from_hf({GPT2!r})
except NotSupportedError as error:
    print(error)
"""
    out = interpreters.run(script)

    assert told in out
    assert "`pip install 'lading-hub[hf]'`" in out


def test_transformers_is_imported_only_by_what_needs_it(interpreters: Interpreters) -> None:
    script = "import sys, lading.families.hg; print('transformers' in sys.modules)"

    assert interpreters.run(script) == "False\n"


# --- rules -----------------------------------------------------------------------------------------------------------


def mixtral() -> Any:
    import transformers

    with torch.device("meta"):
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, num_local_experts=3))


def test_experts_are_stacked_by_few_rules() -> None:
    part = "block_sparse_moe.experts"
    names = [f"model.layers.{n}.{part}.{e}.{w}.weight" for n in range(2) for e in range(3) for w in ("w1", "w2", "w3")]

    rules = rules_of(mixtral(), names)

    prefix, target = f"model.layers.{{a}}.{part}.{{b}}", "model.layers.{a}.mlp.experts"
    assert sorted(rules, key=lambda rule: rule.source) == [
        Rule(f"{prefix}.w1.weight", f"{target}.gate_up_proj", concat=(0, 0), stack="b"),
        Rule(f"{prefix}.w2.weight", f"{target}.down_proj", stack="b"),
        Rule(f"{prefix}.w3.weight", f"{target}.gate_up_proj", concat=(0, 1), stack="b"),
    ]


def test_a_checkpoint_that_is_as_the_model_is_needs_no_rules() -> None:
    model = mixtral()

    assert rules_of(model, list(model.state_dict())) == []


def test_what_old_versions_saved_is_dropped() -> None:
    model = mixtral()

    assert rules_of(model, ["model.layers.0.self_attn.rotary_emb.inv_freq"]) == [
        Rule("model.layers.{a}.self_attn.rotary_emb.inv_freq", None, computed=True)
    ]


def test_a_tensor_is_cut_into_the_parameters_that_it_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the operations that transformers has, in the order in which it does them."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, Concatenate, Interleave, PermuteForRope, WeightConverter

    model = mixtral()
    of_head = [WeightConverter("odd.head", "lm_head.weight", [Interleave(dim=0)])]
    cases: list[tuple[Any, list[str], Any]] = [
        (
            WeightConverter("attn.kv", ["self_attn.k_proj", "self_attn.v_proj"], [Chunk(dim=0)]),
            ["model.layers.0.attn.kv.weight", "model.layers.1.attn.kv.weight"],
            {
                "model.layers.0.self_attn.k_proj.weight": Sliced(0, 0, 16, 0),
                "model.layers.0.self_attn.v_proj.weight": Sliced(0, 16, 16, 0),
                "model.layers.1.self_attn.v_proj.weight": Sliced(0, 16, 16, 1),
            },
        ),
        (
            WeightConverter(["half.a", "half.b"], "lm_head", [Concatenate(dim=1)]),
            ["half.b.weight", "half.a.weight"],
            {"lm_head.weight": Joined(1, (1, 0))},
        ),
        (of_head[0], ["odd.head"], {"lm_head.weight": Reordered(Regroup(0, 32, 2), 0)}),
        (
            WeightConverter("attn.q", "self_attn.q_proj", [PermuteForRope()]),
            ["model.layers.0.attn.q.weight"],
            {"model.layers.0.self_attn.q_proj.weight": Reordered(Regroup(0, 4, 2), 0)},
        ),
    ]
    targets = targets_of(model, dtype=None)
    shapes_of = dict(zip(targets.names, targets.shapes, strict=True))

    for converter, names, expected in cases:
        monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model, c=converter: [c])
        shapes = [(32, 32)] * 2 if "kv" in names[0] else [(64, 16)] * 2 if "half" in names[0] else [(64, 32)]
        if "attn.q" in names[0]:
            shapes = [(32, 32)]
        found = route(names, targets.names, rules_of(model, names), shapes=shapes, target_shapes=targets.shapes)
        made = {targets.names[target]: found.composed[i] for i, target in enumerate(found.targets)}
        assert expected.items() <= made.items()
        assert not found.unexpected
        assert not found.incomplete
        assert shapes_of.keys() >= made.keys()


def test_what_no_rule_can_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    converter = WeightConverter("turned", "lm_head", [Transpose(0, 1)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [converter])

    with pytest.raises(NotSupportedError, match="Transpose"):
        rules_of(mixtral(), ["turned.weight"])


def test_names_of_one_form_that_go_different_ways() -> None:
    model = mixtral()
    names = [f"model.layers.{n}.{name}" for n in range(4) for name in ("input_layernorm.weight", "{odd}.weight")]

    found = route(names, list(model.state_dict()), rules_of(model, names))

    # The model has two layers only, and the rules do not hide it.
    assert set(found.unexpected) == {*names[1:4:2], *names[4:]}


# --- splits ----------------------------------------------------------------------------------------------------------


def test_experts_stay_whole_where_the_rest_is_split() -> None:
    plan = FAMILY.parallel_plan(
        config({"model_type": "mixtral", **DECODER, "num_local_experts": 3}, model_type="causal_lm")
    )

    assert plan.tensor is not None
    assert plan.split_of("model.layers.1.self_attn.q_proj") is Split.COLUMN
    assert plan.split_of("model.layers.1.self_attn.o_proj") is Split.ROW
    assert plan.split_of("model.embed_tokens") is Split.VOCABULARY
    assert plan.split_of("lm_head") is Split.LOGITS
    assert plan.split_of("model.layers.1.mlp.experts") is None
    assert plan.units == ("model.layers.*",)
    plan.check(2)
    with pytest.raises(NotSupportedError, match="`num_key_value_heads` is 2"):
        plan.check(4)


def test_a_model_without_a_plan() -> None:
    plan = FAMILY.parallel_plan(config())

    assert plan.tensor is None
    assert plan.units == ("h.*",)


# --- new models ------------------------------------------------------------------------------------------------------


def test_a_new_model_has_the_numbers_of_its_architecture() -> None:
    model = create_model(
        FAMILY, config(model_type="causal_lm"), gangs=create_fake_gangs("cpu"), dtype=torch.float32, meta=False
    )

    block = model.requires_grad_(False).transformer.h[0]  # type: ignore[union-attr, index]
    assert torch.equal(block.ln_1.weight, torch.ones(32))
    assert torch.equal(block.attn.c_attn.bias, torch.zeros(96))
    assert 0.01 < float(block.attn.c_attn.weight.std()) < 0.03
    # Projections back into the stream are narrower with depth.
    assert float(block.attn.c_proj.weight.std()) < 0.75 * float(block.attn.c_attn.weight.std())
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]
    assert all(parameter.is_meta for parameter in outline(config(model_type="causal_lm")).parameters())


# --- cards -----------------------------------------------------------------------------------------------------------


def test_architectures_and_cards(home: Path) -> None:
    hub = get_hg_model_hub()

    assert hub.get_archs() == {"auto", "causal_lm", "seq2seq_lm", "custom"}
    assert hub.get_arch_config("seq2seq_lm").model_type == "seq2seq_lm"
    assert {card.name for card in hub.iter_cards()} == {
        "hg_qwen25_omni_3b",
        "hg_qwen25_omni_7b",
        "hg_qwen3_0.6b",
        "hg_qwen3_1.7b",
    }
    omni = hub.get_model_config("hg_qwen25_omni_7b")
    assert (omni.model_type, omni.custom_model_class) == ("custom", "Qwen2_5OmniForConditionalGeneration")


@pytest.mark.parametrize("name", ["hg_qwen25_omni_3b", "hg_qwen3_0.6b"])
def test_the_classes_of_cards_are_there(home: Path, name: str) -> None:
    stated = get_hg_model_hub().get_model_config(name)
    model_type = "qwen2_5_omni" if "omni" in name else "qwen3"

    assert FAMILY.complete is not None
    assert FAMILY.complete(stated, {"model_type": model_type}).hf_config == {"model_type": model_type}


def test_a_card_of_a_folder(home: Path, tmp_path: Path) -> None:
    import transformers

    from lading import import_cards, verify_model
    from lading.operations.check import check_model

    transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).save_pretrained(tmp_path / "model")
    card = {"name": "tiny", "model_family": "hg", "model_arch": "causal_lm", "checkpoint": "./model"}
    (tmp_path / "cards.yaml").write_text(json.dumps(card))
    import_cards(tmp_path / "cards.yaml")

    assert check_model("tiny").fits
    assert verify_model("tiny", progress=False).good
    assert type(load_model("tiny")) is transformers.GPT2LMHeadModel
    (tmp_path / "bad.yaml").write_text(json.dumps(card | {"name": "bad", "model_config": {"model_type": "vision"}}))
    import_cards(tmp_path / "bad.yaml")
    with pytest.raises(AssetCardError, match="model_type"):
        load_model("bad")


@pytest.mark.parametrize(("stated", "passed_over"), [(None, 0), (0, 0), (1, 1), (2, 2), (101, 0)])
def test_layers_that_draft_tokens_are_passed_over_where_they_are_stated(stated: int | None, passed_over: int) -> None:
    values: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "vocab_size": 8,
    }
    values |= {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    values |= {} if stated is None else {"num_nextn_predict_layers": stated}
    assert FAMILY.from_hf is not None
    drafting = FAMILY.from_hf(values)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(5)]

    renamed = rename(names, FAMILY.rules_for(drafting, names))

    assert renamed == [None if 2 <= layer < 2 + passed_over else name for layer, name in enumerate(names)]


def test_the_page_lists_every_style_of_transformers_plans() -> None:
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    page = Path(__file__).parents[3] / "docs" / "explanation" / "transformers-models.md"
    table = re.findall(r"^\| (`.+?) \| ", page.read_text(encoding="utf-8"), re.MULTILINE)

    assert {style for cell in table for style in re.findall(r"`(\w+)`", cell)} == set(ALL_PARALLEL_STYLES.keys())
