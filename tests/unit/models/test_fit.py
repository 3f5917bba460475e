"""Whether a checkpoint fits its architecture, from its manifest alone."""

from __future__ import annotations

import pickle
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Module, Parameter

from lading.errors import AssetCardError, ModelCheckpointMismatchError, ModelConfigError, NotSupportedError
from lading.families.llama import LLaMAConfig
from lading.families.qwen import FAMILY as QWEN
from lading.families.qwen import QwenConfig
from lading.formats import index
from lading.formats.manifest import BITS, Manifest, Shard
from lading.models.family import Family
from lading.models.fit import CheckReport, check_manifest, match, report_fit, require_fit
from lading.models.shapes import targets_of_config
from tests.helpers.examples import examples
from tests.helpers.make_checkpoint import qwen_config

CONFIG = qwen_config()
EMBEDDING, NORM, UP = "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def tensors(config: QwenConfig = CONFIG) -> Tensors:
    from lading.models.construct import build_on_meta

    state = build_on_meta(QWEN, config).state_dict()
    return {name: ("BF16", tuple(t.shape)) for name, t in state.items() if name != "lm_head.weight"}


def manifest(tensors: Tensors) -> Manifest:
    return Manifest(
        format="safetensors",
        shards=(Shard(name="model.safetensors", size=1 << 30),),
        names=list(tensors),
        dtypes=[dtype for dtype, _ in tensors.values()],
        shapes=[shape for _, shape in tensors.values()],
        shard_ids=array("I", [0] * len(tensors)),
        offsets=array("q", range(len(tensors))),
    )


def check(tensors: Tensors, config: QwenConfig = CONFIG) -> CheckReport:
    return check_manifest(manifest(tensors), QWEN, config)


def test_a_configuration_that_makes_no_model_is_a_wrong_argument_and_a_wrong_card() -> None:
    with pytest.raises(ModelConfigError, match=r"No model of the qwen family .*`num_attn_heads` must be") as caught:
        check(tensors(), replace(CONFIG, num_attn_heads=3))

    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, AssetCardError)


def test_a_problem_is_a_line_whatever_names_hold() -> None:
    report = check(tensors() | {"a\nb\u2028c": ("F32", (1,))})
    with pytest.raises(ModelCheckpointMismatchError) as caught:
        require_fit(report, path="x", name="x")

    assert caught.value.message.splitlines()[1:] == ["  unexpected: a\\nb\\nc"]


def test_one_that_fits() -> None:
    report = check(tensors())

    assert report == CheckReport(
        family="qwen",
        problems=(),
        quantized={},
        tensors=24,
        matched=24,
        tied={},
        dropped=(),
        drawn=(),
        parameters=21_824,
        bytes=43_648,
        advice="",
    )
    assert report.fits
    require_fit(report, path="x", name="tiny")
    assert pickle.loads(pickle.dumps(report)) == report


@pytest.mark.parametrize("shares", [True, False])
def test_a_copy_that_shares_its_bytes_is_not_compared(shares: bool, tmp_path: Path) -> None:
    """``torch.save`` writes tied parameters once, under both names."""
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, (_, shape) in tensors().items()}
    state["lm_head.weight"] = state[EMBEDDING] if shares else state[EMBEDDING].clone()
    torch.save(state, tmp_path / "model.pt")

    found = match(index(tmp_path / "model.pt"), targets_of_config(QWEN, CONFIG), QWEN, CONFIG)

    assert [name for _, _, name in found.copies()] == ([] if shares else ["lm_head.weight"])
    assert report_fit(found).tied == {"lm_head.weight": EMBEDDING}


def test_what_a_model_does_not_need_and_what_it_needs_once() -> None:
    given = tensors()
    given["lm_head.weight"] = given[EMBEDDING]
    given["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", (4,))

    report = check(given)

    assert report.fits
    assert (report.tensors, report.matched, report.bytes) == (26, 24, 43_648)
    assert report.tied == {"lm_head.weight": EMBEDDING}
    assert report.dropped == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def test_names_go_through_the_rules() -> None:
    assert check({name.removeprefix("model."): value for name, value in tensors().items()}).fits


def test_all_problems_together() -> None:
    given = tensors()
    del given["model.layers.0.mlp.up_proj.weight"]
    given["extra"] = ("F32", (1,))
    given[NORM] = ("BF16", (33,))
    given["norm.weight"] = ("BF16", (32,))
    given[UP] = ("F8_E4M3", (64, 32))
    given["lm_head.weight"] = ("BF16", (101, 32))

    report = check(given)

    assert report.problems == (
        f"quantized: {UP} is stored as F8_E4M3",
        "missing: model.layers.0.mlp.up_proj.weight [64, 32]",
        "unexpected: extra",
        f"claimed by 2 tensors: {NORM} by {NORM}, norm.weight",
        f"mis-shaped: {NORM} is expected to be [32], but is [33]",
        "mis-shaped: lm_head.weight is expected to be [100, 32], but is [101, 32]",
    )
    assert not report.fits
    assert "architecture" in report.advice
    assert report.quantized == {UP: "F8_E4M3"}
    assert report.dropped == ()


def test_the_error_of_a_load() -> None:
    report = check({**tensors(), NORM: ("BF16", (33,))})
    with pytest.raises(
        ModelCheckpointMismatchError, match=r"(?s)at m does not fit .* of tiny: 1 problem\. .*\[33\]"
    ) as one:
        require_fit(report, path="m", name="tiny")
    assert one.value.problems == report.problems

    report = check(tensors(), replace(CONFIG, num_layers=9))
    with pytest.raises(ModelCheckpointMismatchError, match=r"(?s)77 problems\. .*\n  … and 57 more$") as many:
        require_fit(report, path=Path("m"), name="tiny")
    assert many.value.problems == report.problems
    assert len(report.problems) == 77

    report = check({**tensors(), NORM: ("BF16", (33,)), UP: ("I8", (64, 32))})
    with pytest.raises(NotSupportedError, match=rf"'{UP}' as I8: it is quantized"):
        require_fit(report, path="m", name="tiny")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "state.module._orig_mod."])
def test_a_wrapper_before_all_names_is_named(prefix: str) -> None:
    report = check({prefix + name: value for name, value in tensors().items()})

    assert f"begin with {prefix!r}" in report.advice
    with pytest.raises(ModelCheckpointMismatchError) as caught:
        require_fit(report, path="m", name="tiny")
    shown = caught.value.message.splitlines()
    assert sum(line.startswith("  missing: ") for line in shown) == 10
    assert sum(line.startswith(f"  unexpected: {prefix}") for line in shown) == 10
    assert len(caught.value.problems) == 2 * len(tensors())


def test_one_name_that_is_not_of_a_wrapper() -> None:
    given = {"module." + name: value for name, value in tensors().items()} | {"other": ("F32", (1,))}
    assert "begin with" not in check(given).advice


def test_what_the_names_suggest() -> None:
    untied = replace(CONFIG, tied_embeddings=False)
    bare = {name: value for name, value in tensors(untied).items() if name != "lm_head.weight"}
    for state in (bare, bare | {"score.weight": ("BF16", (2, 32))}):
        assert "get_hg_model_hub()" in check(state, untied).advice
    assert "get_hg_model_hub()" not in check(bare | {"extra": ("BF16", (2, 32))}, untied).advice

    more = tensors() | {f"model.layers.{i}.{part}": ("BF16", (1,)) for i in (7, 12) for part in ("a", "b")}
    advice = check(more).advice
    assert "model.layers.7 is not in it" in advice
    assert "num_nextn_predict_layers" in advice

    assert check(tensors() | {"mtp.fc.weight": ("BF16", (1,))}).dropped == ("mtp.fc.weight",)


@dataclass
class CounterConfig:
    size: int = 3


class Counter(Module):
    """A weight, and a buffer that counts."""

    def __init__(self, config: CounterConfig) -> None:
        super().__init__()
        self.weight = Parameter(torch.empty(config.size))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))


@pytest.mark.parametrize(
    ("weight", "steps", "problems"),
    [
        ("F64", "I64", ()),
        ("F32", "I32", ()),
        ("F32", "U64", ("of another dtype: steps is expected to be I64, but is U64",)),
        (
            "I64",
            "F32",
            ("quantized: weight is stored as I64", "of another dtype: steps is expected to be I64, but is F32"),
        ),
    ],
)
def test_what_is_no_weight_must_be_of_the_same_dtype(weight: str, steps: str, problems: tuple[str, ...]) -> None:
    family = Family(
        name="counter", kls=Counter, config_kls=CounterConfig, build=Counter, init=lambda model, config: None
    )
    given = manifest({"weight": (weight, (3,)), "steps": (steps, ())})

    assert check_manifest(given, family, CounterConfig()).problems == problems


def test_a_configuration_of_another_class() -> None:
    with pytest.raises(TypeError, match="must be of type QwenConfig"):
        check_manifest(manifest({}), QWEN, LLaMAConfig())


@settings(max_examples=examples(60))
@given(st.data())
def test_any_change_is_reported(data: st.DataObject) -> None:
    """Each tensor is matched, tied, dropped or told of; what is not told of is as the architecture has it."""
    wanted, given = tensors(), tensors()
    for name in data.draw(st.lists(st.sampled_from(sorted(wanted)), max_size=5)):
        change: Any = data.draw(st.sampled_from(["gone", "named", "shaped", "cast", "quantized"]))
        value = given.pop(name, None)
        if value is None or change == "gone":
            continue
        dtype, shape = value
        match change:
            case "named":
                given[name + "_2"] = value
            case "shaped":
                given[name] = dtype, (*shape, 1)
            case "cast":
                given[name] = data.draw(st.sampled_from(["F16", "F32", "F64"])), shape
            case "quantized":
                given[name] = data.draw(st.sampled_from(sorted(BITS.keys() - {"F16", "BF16", "F32", "F64"}))), shape

    report = check(given)

    floats = ("F16", "BF16", "F32", "F64")
    bad = {n for n, (d, s) in given.items() if n not in wanted or s != wanted[n][1] or d not in floats}
    bad |= wanted.keys() - given.keys()
    assert report.fits == (not bad)
    told = "\n".join(report.problems)
    assert all(f" {name}" in told for name in bad)
    assert all(f" {name} " not in told + " " for name in wanted.keys() - bad)
    assert report.tensors == len(given)
    assert report.matched == len(wanted.keys() & given.keys())
