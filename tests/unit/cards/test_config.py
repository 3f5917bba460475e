"""From mappings to configurations, and what is said where that fails."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import torch
from pydantic import ConfigDict, Field

from lading.cards.card import Architecture, AssetCard
from lading.cards.config import architecture_config, resolve_config
from lading.errors import AssetCardError, InternalError


@dataclass
class Scale:
    """As in a package that does not know pydantic."""

    factor: float = 8.0
    bounds: tuple[float, float] = (1.0, 4.0)


@dataclass(kw_only=True)
class ToyConfig:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    model_dim: int = 64
    pad_idx: int | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    name: str = "toy"
    mode: Literal["none", "layer"] = "layer"
    scale: Scale = field(default_factory=lambda: Scale(factor=2.0))
    scales: list[Scale] = field(default_factory=list)
    either: int | list[str] = 0
    heads: Annotated[int, Field(gt=0)] = 4
    table: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model_dim % self.heads:
            raise ValueError(f"model_dim {self.model_dim} is not a multiple of heads {self.heads}")


def card(config: object, base: AssetCard | None = None, name: str = "toy_7b") -> AssetCard:
    return AssetCard(name, {"model_config": config}, base, source=f"{name}.yaml[3]")


def resolve(config: object) -> ToyConfig:
    return resolve_config(card(config), None, ToyConfig)


def failure(config: object) -> str:
    with pytest.raises(AssetCardError) as error:
        resolve(config)
    assert error.value.name == "toy_7b"

    return str(error.value)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "stated", "expected"),
    [
        ("model_dim", 128, 128),
        ("model_dim", "128", 128),
        ("model_dim", " 128 ", 128),
        ("model_dim", 128.0, 128),
        ("pad_idx", None, None),
        ("pad_idx", 3, 3),
        ("pad_idx", "3", 3),
        ("norm_eps", 1, 1.0),
        ("norm_eps", "1e-6", 1e-6),
        ("tied", True, True),
        ("name", "x", "x"),
        ("name", "1", "1"),
        ("mode", "none", "none"),
        ("scale", {"factor": 4}, Scale(factor=4.0)),
        ("scale", {"bounds": [2, "3"]}, Scale(factor=2.0, bounds=(2.0, 3.0))),
        ("scales", [{"factor": 1}, {}], [Scale(factor=1.0), Scale()]),
        ("either", 3, 3),
        ("either", ["a"], ["a"]),
        ("table", {"a": "1"}, {"a": 1}),
    ],
)
def test_values_that_are_taken(key: str, stated: object, expected: object) -> None:
    found = getattr(resolve({key: stated}), key)

    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "stated", "problem"),
    [
        ("model_dim", True, ": expected an integer, found true"),
        ("model_dim", 64.5, ": expected an integer, found 64.5"),
        ("model_dim", "64.5", ": expected an integer, found '64.5'"),
        ("model_dim", "x", ": expected an integer, found 'x'"),
        ("model_dim", "", ": expected an integer, found ''"),
        ("model_dim", None, ": expected an integer, found null"),
        ("model_dim", [64], ": expected an integer, found a list"),
        ("pad_idx", False, ": expected an integer, found false"),
        ("norm_eps", True, ": expected a number, found true"),
        ("norm_eps", "x", ": expected a number, found 'x'"),
        ("norm_eps", "nan", ": expected a finite number, found 'nan'"),
        ("norm_eps", "-Infinity", ": expected a finite number, found '-Infinity'"),
        ("norm_eps", "1e999", ": expected a finite number, found '1e999'"),
        ("tied", 1, ": expected true or false, found 1"),
        ("tied", "yes", ": expected true or false, found 'yes'"),
        ("tied", "true", ": expected true or false, found 'true'"),
        ("name", 1, ": expected a string, found 1"),
        ("name", None, ": expected a string, found null"),
        ("mode", "stack", ": expected 'none' or 'layer', found 'stack'"),
        ("scale", None, ": expected a mapping, found null"),
        ("scale", [], ": expected a mapping, found a list"),
        ("scale", {"factor": "x"}, ".factor: expected a number, found 'x'"),
        ("scale", {"bounds": 1}, ".bounds: expected a list, found 1"),
        ("scale", {"bounds": [1]}, ".bounds: expected a longer list, found one of 1"),
        ("scale", {"bounds": [1, 2, 3]}, ".bounds: expected a list of 2, found one of 3"),
        ("scale", {"bounds": [1, "x"]}, ".bounds[1]: expected a number, found 'x'"),
        ("scale", {"factr": 1}, ".factr: expected a field of Scale, found an unknown key. Did you mean 'factor'?"),
        ("scales", [{}, {"x": 1}], "[1].x: expected a field of Scale, found an unknown key"),
        ("scales", [{}, 1], "[1]: expected a mapping, found 1"),
        ("either", True, ": expected an integer or a list, found true"),
        ("heads", 0, ": expected greater than 0, found 0"),
        ("table", {"a b": "x"}, ".'a b': expected an integer, found 'x'"),
        ("modell_dim", 1, ": expected a field of ToyConfig, found an unknown key. Did you mean 'model_dim'?"),
        ("x", 1, ": expected a field of ToyConfig, found an unknown key"),
    ],
)
def test_values_that_are_refused(key: str, stated: object, problem: str) -> None:
    assert failure({key: stated}) == (
        f"The configuration of the card 'toy_7b' does not fit ToyConfig: toy_7b.yaml[3].model_config.{key}{problem}"
    )


def test_all_that_is_wrong_is_said_at_once() -> None:
    found = failure({"model_dim": True, "scale": {"factor": "x", "y": 1}, "tied": 0, "z": 1})

    assert found.splitlines()[0] == "The configuration of the card 'toy_7b' does not fit ToyConfig:"
    assert sorted(line.split(": ")[0] for line in found.splitlines()[1:]) == [
        "  toy_7b.yaml[3].model_config.model_dim",
        "  toy_7b.yaml[3].model_config.scale.factor",
        "  toy_7b.yaml[3].model_config.scale.y",
        "  toy_7b.yaml[3].model_config.tied",
        "  toy_7b.yaml[3].model_config.z",
    ]


def test_values_that_do_not_fit_together() -> None:
    assert failure({"model_dim": 63}).endswith(
        " does not fit ToyConfig: ToyConfig: expected values that fit together, found some that do not: "
        "model_dim 63 is not a multiple of heads 4"
    )


# --- layers ----------------------------------------------------------------------------------------------------------


def test_defaults_architecture_bases_and_card() -> None:
    architecture = Architecture(name="big", family="toy", overrides=({"model_dim": 8, "heads": 8}, {"norm_eps": 1}))
    root = card({"model_dim": 16, "scale": {"factor": 3}}, name="root")
    leaf = card({"name": "leaf", "scale": {"bounds": [5, 6]}}, AssetCard("middle", {}, root))

    assert architecture_config(architecture, ToyConfig) == ToyConfig(model_dim=8, heads=8, norm_eps=1.0)
    assert resolve_config(leaf, architecture, ToyConfig) == ToyConfig(
        model_dim=16, heads=8, norm_eps=1.0, name="leaf", scale=Scale(factor=3.0, bounds=(5.0, 6.0))
    )
    assert resolve_config(AssetCard("x", {}), None, ToyConfig) == ToyConfig()


def test_what_is_deleted_falls_back_to_the_default_of_the_class() -> None:
    root = card({"model_dim": 16, "scale": {"factor": 3, "bounds": [5, 6]}}, name="root")

    assert resolve_config(card({"_del_": ["model_dim", "scale"]}, root), None, ToyConfig) == ToyConfig()
    found = resolve_config(card({"scale": {"_del_": ["factor"]}}, root), None, ToyConfig)
    assert found.scale == Scale(factor=8.0, bounds=(5.0, 6.0))
    found = resolve_config(card({"_set_": {"scale": {}}}, root), None, ToyConfig)
    assert found.scale == Scale()


def test_a_new_object_each_time() -> None:
    plain = AssetCard("x", {})
    for make in (
        lambda: resolve_config(plain, None, ToyConfig),
        lambda: resolve_config(card({"table": {"a": 1}, "scales": [{}]}), None, ToyConfig),
        lambda: architecture_config(Architecture(name="a", family="toy", overrides=()), ToyConfig),
    ):
        first, second = make(), make()
        first.scale.factor = 99.0
        first.table["b"] = 2
        first.scales.append(Scale())
        first.model_dim = 1

        assert second == make()
        assert second.scale.factor == 2.0


def test_variables_of_the_environment_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LADING_TEST_DIM", "128")

    found = resolve({"model_dim": "${env:LADING_TEST_DIM}", "norm_eps": "${env:LADING_TEST_UNSET:1e-6}"})

    assert found == ToyConfig(model_dim=128, norm_eps=1e-6)


SECRET = "hf_0123456789abcdef"


@pytest.mark.parametrize(
    "overrides",
    [
        {"model_dim": "${env:LADING_TEST_SECRET}"},
        {"model_dim": "1${env:LADING_TEST_SECRET}2"},
        {"nonsense": "${env:LADING_TEST_SECRET}"},
        {"scale": "${env:LADING_TEST_SECRET}"},
        {"scale": {"factor": "${env:LADING_TEST_SECRET}"}},
        {"scale": {"factor": ["${env:LADING_TEST_SECRET}"]}},
        {"_set_": "${env:LADING_TEST_SECRET}"},
        {"_set_": {"scale": {"factor": "${env:LADING_TEST_SECRET}"}}},
        {"_del_": "${env:LADING_TEST_SECRET}"},
        {"_del_": ["${env:LADING_TEST_SECRET}", 1]},
    ],
)
def test_what_a_variable_holds_is_not_shown(monkeypatch: pytest.MonkeyPatch, overrides: dict[str, object]) -> None:
    monkeypatch.setenv("LADING_TEST_SECRET", SECRET)

    with pytest.raises(AssetCardError) as error:
        resolve(overrides)
    assert SECRET not in str(error.value)


def test_what_a_family_says_of_a_variable_shows_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(kw_only=True)
    class Picky:
        size: int = 8

        def __post_init__(self) -> None:
            if self.size > 8:
                raise ValueError(f"{self.size} is too much")

    monkeypatch.setenv("LADING_TEST_SIZE", "123456")
    with pytest.raises(AssetCardError, match=r"\$\{env:LADING_TEST_SIZE\} is too much"):
        resolve_config(card({"size": "${env:LADING_TEST_SIZE}"}), None, Picky)


@dataclass(kw_only=True)
class Free:
    size: int = 8
    word: Literal["a", "b"] = "a"
    text: str = ""
    others: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    "overrides", [{"text": "${env:LADING_TEST_WORD}"}, {"others": {"x": {"y": ["is ${env:LADING_TEST_WORD}"]}}}]
)
def test_a_variable_is_no_free_text(monkeypatch: pytest.MonkeyPatch, overrides: dict[str, object]) -> None:
    """Text that a configuration keeps would stand in an exported config.json, and in any message."""
    monkeypatch.setenv("LADING_TEST_WORD", "b")

    assert resolve_config(card({"word": "${env:LADING_TEST_WORD}"}), None, Free).word == "b"
    with pytest.raises(AssetCardError, match=r"LADING_TEST_WORD") as error:
        resolve_config(card({"word": "${env:LADING_TEST_WORD}", **overrides}), None, Free)
    assert error.value.name == "toy_7b"


def test_the_card_that_states_a_wrong_value_is_named() -> None:
    root = card({"model_dim": "x", "scale": {"factor": 1}}, name="root")
    middle = card({"_set_": {"scale": {"factor": "y"}}}, root, name="middle")
    leaf = card({"model_dim": 8, "heads": 2}, middle, name="leaf")

    with pytest.raises(
        AssetCardError, match=r"card 'leaf' does not fit ToyConfig: middle\.yaml\[3\]\.model_config\.sc"
    ) as error:
        resolve_config(leaf, None, ToyConfig)
    assert error.value.name == "middle"

    with pytest.raises(AssetCardError, match=r"root\.yaml\[3\]\.model_config\.model_dim: ") as error:
        resolve_config(card({"heads": 2}, root), None, ToyConfig)
    assert error.value.name == "root"


def test_the_architecture_that_states_a_wrong_value_is_named() -> None:
    architecture = Architecture(
        name="big", family="toy", overrides=({"heads": "x"}, {"model_dim": 8}), sources=("toy.yaml[0]", "toy.yaml[1]")
    )
    problem = r"does not fit ToyConfig: toy\.yaml\[0\]\.config\.heads: expected an integer, found 'x'"

    with pytest.raises(AssetCardError, match=rf"^The configuration of the toy architecture 'big' {problem}") as error:
        architecture_config(architecture, ToyConfig)
    assert error.value.name == "big"
    with pytest.raises(AssetCardError, match=rf"^The configuration of the card 'toy_7b' {problem}"):
        resolve_config(card({}), architecture, ToyConfig)
    assert resolve_config(card({"heads": 4}), architecture, ToyConfig).heads == 4


def test_overrides_that_are_no_mapping() -> None:
    assert failure([1]) == "toy_7b.yaml[3].model_config: expected a mapping, found a list. Correct it there."


# --- classes ---------------------------------------------------------------------------------------------------------


def test_classes_without_defaults() -> None:
    @dataclass
    class Required:
        size: int

    with pytest.raises(
        InternalError, match=r"^Required is expected to be a dataclass with a default for every field: "
    ):
        resolve_config(card({"size": 1}), None, Required)


def test_classes_that_cannot_be_used() -> None:
    class Plain:
        pass

    @dataclass
    class Strange:
        value: Plain | None = None

    @dataclass
    class OfAnotherPackage:
        value: pytest.Config | None = None

    with pytest.raises(InternalError, match=r"^The fields of OfAnotherPackage cannot be checked: .*Config"):
        resolve_config(card({}), None, OfAnotherPackage)
    with pytest.raises(InternalError, match=r"^Plain is expected to be a dataclass"):
        resolve_config(card({}), None, Plain)
    with pytest.raises(InternalError, match=r"^The fields of Strange cannot be checked: "):
        resolve_config(card({}), None, Strange)


def test_torch_is_not_imported() -> None:
    code = "import sys, lading.cards.config; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# --- values that are stated by their names -------------------------------------------------------------------------


CPU = torch.device("cpu")


class Order(Enum):
    PRE = 0
    POST = "post"


@dataclass
class NamedConfig:
    order: Order = Order.PRE
    dtype: torch.dtype = torch.float32
    maybe: torch.dtype | None = None
    device: torch.device = CPU
    folder: Path = Path("x")
    by_name: dict[str, Order] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"order": "POST"}, NamedConfig(order=Order.POST)),
        ({"order": "post"}, NamedConfig(order=Order.POST)),
        ({"order": 0}, NamedConfig()),
        ({"by_name": {"a": "PRE", "b": "post"}}, NamedConfig(by_name={"a": Order.PRE, "b": Order.POST})),
        ({"dtype": "torch.bfloat16", "maybe": "float16"}, NamedConfig(dtype=torch.bfloat16, maybe=torch.float16)),
        ({"maybe": None}, NamedConfig()),
        ({"device": "cuda:1"}, NamedConfig(device=torch.device("cuda", 1))),
        ({"folder": "a/b"}, NamedConfig(folder=Path("a/b"))),
    ],
)
def test_values_that_are_stated_by_their_names(stated: object, expected: NamedConfig) -> None:
    assert resolve_config(card(stated), None, NamedConfig) == expected


@pytest.mark.parametrize(
    ("stated", "problem"),
    [
        ({"order": "last"}, "toy_7b.yaml[3].model_config.order: expected 0 or 'post', found 'last'"),
        ({"dtype": "bf17"}, "toy_7b.yaml[3].model_config.dtype: expected the name of a dtype, found 'bf17'"),
        ({"dtype": "Tensor"}, "toy_7b.yaml[3].model_config.dtype: expected the name of a dtype, found 'Tensor'"),
        ({"dtype": "cpu"}, "toy_7b.yaml[3].model_config.dtype: expected the name of a dtype, found 'cpu'"),
        ({"maybe": 16}, "toy_7b.yaml[3].model_config.maybe: expected the name of a dtype, found 16"),
        ({"device": "float32"}, "toy_7b.yaml[3].model_config.device: expected the name of a device, found 'float32'"),
        ({"folder": 3}, "toy_7b.yaml[3].model_config.folder: expected a path, found 3"),
    ],
)
def test_names_of_other_things(stated: object, problem: str) -> None:
    with pytest.raises(AssetCardError) as error:
        resolve_config(card(stated), None, NamedConfig)
    assert problem in str(error.value)


@pytest.mark.parametrize("directive", [{"_set_": [1]}, {"_del_": "order"}, {"_del_": [1]}, {"by_name": {"_set_": 1}}])
def test_malformed_directives_are_errors_of_the_card(directive: object) -> None:
    with pytest.raises(AssetCardError, match=r"toy_7b\.yaml\[3\]\.model_config.*_(set|del)_: expected"):
        resolve_config(card(directive), None, NamedConfig)
