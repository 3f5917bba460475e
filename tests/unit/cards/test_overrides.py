"""What is laid over a configuration, in which order, and how."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lading.cards.card import Architecture, AssetCard
from lading.cards.overrides import (
    EnvText,
    Layer,
    architecture_layers,
    expand_env,
    last_layer,
    layers_of,
    merge,
    merge_layers,
)
from lading.errors import AssetCardError

BASE = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": [1, 2]}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, BASE),
        ({"a": 5}, BASE | {"a": 5}),
        ({"z": 5}, BASE | {"z": 5}),
        ({"a": None}, BASE | {"a": None}),
        ({"f": [3]}, BASE | {"f": [3]}),
        ({"b": {"c": 5}}, BASE | {"b": {"c": 5, "d": {"e": 3}}}),
        ({"b": {"d": {"x": 5}}}, BASE | {"b": {"c": 2, "d": {"e": 3, "x": 5}}}),
        ({"b": {}}, BASE),
        ({"b": None}, BASE | {"b": None}),
        ({"a": {"x": 1}}, BASE | {"a": {"x": 1}}),
        ({"_del_": ["a", "nothing"]}, {"b": BASE["b"], "f": BASE["f"]}),
        ({"_del_": []}, BASE),
        ({"_del_": None, "_set_": None}, BASE),
        ({"b": {"_del_": ["d"]}}, BASE | {"b": {"c": 2}}),
        ({"_del_": ["b"], "b": {"x": 1}}, {"a": 1, "f": [1, 2], "b": {"x": 1}}),
        ({"_set_": {"b": {"x": 1}}}, BASE | {"b": {"x": 1}}),
        ({"b": {"_set_": {"d": 5}}}, BASE | {"b": {"c": 2, "d": 5}}),
        ({"a": 5, "_set_": {"a": 6}}, BASE | {"a": 6}),
        ({"_set_": {"b": {"_del_": ["c"]}}}, BASE | {"b": {"_del_": ["c"]}}),
        ({"new": {"_set_": {"x": 1}, "_del_": ["y"], "z": 2}}, BASE | {"new": {"z": 2, "x": 1}}),
    ],
)
def test_merge(overrides: dict[str, Any], expected: dict[str, Any]) -> None:
    base, before = deepcopy(BASE), deepcopy(overrides)

    assert merge(base, overrides, path="x") == expected
    assert base == BASE
    assert overrides == before


def test_merge_shares_nothing() -> None:
    base = {"a": {"b": [1]}, "c": [1]}
    overrides = {"a": {"d": [2]}, "e": [2], "_set_": {"f": [3]}}

    merged: Any = merge(base, overrides, path="x")
    for part in (merged["a"]["b"], merged["a"]["d"], merged["c"], merged["e"], merged["f"]):
        part.append(0)

    assert base == {"a": {"b": [1]}, "c": [1]}
    assert overrides == {"a": {"d": [2]}, "e": [2], "_set_": {"f": [3]}}


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"_del_": "a"}, "q.yaml[0].model_config._del_: expected a list of keys, found 'a'"),
        ({"_del_": [1]}, "q.yaml[0].model_config._del_: expected a list of keys, found [1]"),
        ({"b": {"d": {"_del_": {}}}}, "q.yaml[0].model_config.b.d._del_: expected a list of keys, found a mapping"),
        ({"_set_": ["a"]}, "q.yaml[0].model_config._set_: expected a mapping, found ['a']"),
        ({"x y": {"_set_": 1}}, "q.yaml[0].model_config.'x y'._set_: expected a mapping, found 1"),
    ],
)
def test_directives_of_the_wrong_form(overrides: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as error:
        merge(BASE, overrides, path="q.yaml[0].model_config")

    assert str(error.value) == f"{problem}."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${env:SIZE}", "7"),
        ("${env:SIZE:8}", "7"),
        ("${env:UNSET:8}", "8"),
        ("${env:UNSET:}", ""),
        ("${env:UNSET}", ""),
        ("${env:EMPTY:8}", ""),
        ("a ${env:SIZE} b ${env:UNSET:c d} e", "a 7 b c d e"),
        ("${env:UNSET:https://x:80/}", "https://x:80/"),
        ("${env:NESTED}", "${env:SIZE}"),
        ("${env:7}", "${env:7}"),
        ("${env:}", "${env:}"),
        ("$env:SIZE", "$env:SIZE"),
        ("${SIZE}", "${SIZE}"),
    ],
)
def test_variables_of_the_environment(text: str, expected: str) -> None:
    environ = {"SIZE": "7", "EMPTY": "", "NESTED": "${env:SIZE}"}

    assert EnvText(text).expand(environ) == expected


def test_variables_are_replaced_at_every_depth_but_not_in_keys() -> None:
    value = {"a": {"${env:A}": ["${env:A}", {"b": "${env:A}"}, 1, None, True, 2.5]}}
    (layer,) = layers_of(card(value), None)

    assert layer.overrides == value
    assert expand_env(layer.overrides, {"A": "x"}) == {"a": {"${env:A}": ["x", {"b": "x"}, 1, None, True, 2.5]}}


ARCHITECTURE = Architecture(
    name="big", family="toy", overrides=({"a": 1}, {"b": 2}), sources=("t.yaml[0]", "t.yaml[1]")
)


def card(*configs: dict[str, Any], key: str = "model_config") -> AssetCard:
    """A card with its bases, the root first."""
    found: AssetCard | None = None
    for i, config in enumerate(configs):
        found = AssetCard(f"card{i}", {key: config} if config else {}, found, source=f"c.yaml[{i}]")
    assert found is not None

    return found


def test_layers() -> None:
    found = layers_of(card({"c": 3}, {}, {"d": 4}), ARCHITECTURE)

    assert found == [
        Layer({"a": 1}, "t.yaml[0].config", "big", "architecture"),
        Layer({"b": 2}, "t.yaml[1].config", "big", "architecture"),
        Layer({"c": 3}, "c.yaml[0].model_config", "card0"),
        Layer({"d": 4}, "c.yaml[2].model_config", "card2"),
    ]
    assert layers_of(card({}), None) == []
    assert layers_of(AssetCard("x", {"model_config": None}), None) == []


def test_layers_of_values_that_come_from_no_file() -> None:
    architecture = Architecture(name="big", family="toy", overrides=({},))

    assert architecture_layers(architecture) == [Layer({}, "big.config", "big", "architecture")]
    assert layers_of(AssetCard("x", {"model_config": {}}), None) == [Layer({}, "x.model_config", "x")]


def test_an_overlay_is_named_as_the_source_of_what_it_states() -> None:
    overlaid = AssetCard(
        "x", {"model_config": {}}, source="c.yaml[0]", sources={"model_config": "mine.yaml[1]", "url": "mine.yaml[1]"}
    )

    assert layers_of(overlaid, None) == [Layer({}, "mine.yaml[1].model_config", "x")]


def test_of_the_three_fields_the_first_that_any_card_has_is_used_alone() -> None:
    base = AssetCard("base", {"model_config_overrides": {"a": 1}, "model_config": {"a": 2}})
    leaf = AssetCard("leaf", {"model_config": {"a": 3}, "model_config_override": {"a": 4}}, base)

    assert [layer.overrides for layer in layers_of(leaf, None)] == [{"a": 1}]


def test_variables_are_replaced_in_cards_only() -> None:
    text = "${env:LADING_TEST_SIZE}"
    architecture = Architecture(name="big", family="toy", overrides=({"a": text, "b": {"c": text}},))
    merged = merge_layers({}, layers_of(card({"b": {"d": text}}, {"_set_": {"e": [text]}}), architecture))

    assert merged == {"a": text, "b": {"c": text, "d": text}, "e": [text]}
    assert expand_env(merged, {"LADING_TEST_SIZE": "7"}) == {"a": text, "b": {"c": text, "d": "7"}, "e": ["7"]}


@pytest.mark.parametrize("key", ["model_config", "model_config_overrides"])
def test_a_null_takes_back_what_the_bases_say(key: str) -> None:
    root = AssetCard("root", {key: {"a": 1}})
    middle = AssetCard("middle", {key: None}, root)

    assert layers_of(middle, None) == []
    assert [layer.overrides for layer in layers_of(AssetCard("leaf", {key: {"b": 2}}, middle), None)] == [{"b": 2}]


KEYS = st.sampled_from("abc")


def tagged(tag: int, *, directives: bool = True) -> st.SearchStrategy[dict[str, object]]:
    """Mappings whose values all are ``tag``."""

    def mappings(values: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
        plain = st.dictionaries(KEYS, values, max_size=3)
        if not directives:
            return plain
        removed = st.fixed_dictionaries({}, optional={"_del_": st.lists(KEYS, max_size=2)})
        replaced = st.fixed_dictionaries({}, optional={"_set_": tagged(tag, directives=False)})
        return st.builds(lambda *parts: {k: v for part in parts for k, v in part.items()}, plain, removed, replaced)

    return mappings(st.recursive(st.just(tag), mappings, max_leaves=4))


def leaves(value: object, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*place, key))
    else:
        yield place, value


@given(tagged(-1, directives=False), st.tuples(*(tagged(tag) for tag in range(3))))
def test_the_last_layer_of_a_value_is_the_one_that_states_it(
    base: dict[str, object], stated: tuple[dict[str, object], ...]
) -> None:
    layers = [Layer(overrides, "x", str(tag)) for tag, overrides in enumerate(stated)]
    for place, tag in leaves(merge_layers(base, layers)):
        layer = last_layer(layers, place)
        assert (-1 if layer is None else int(layer.owner)) == tag, place


def test_merging_layers() -> None:
    layers = [Layer({"a": 5, "b": {"_del_": ["c"]}}, "x", "x"), Layer({"b": {"c": 6}}, "y", "y")]

    assert merge_layers(BASE, layers) == BASE | {"a": 5, "b": {"d": {"e": 3}, "c": 6}}
    assert merge_layers(BASE, []) == BASE


@pytest.mark.parametrize("overrides", [[], "x", 1, None])
def test_layers_that_are_no_mappings(overrides: object) -> None:
    with pytest.raises(AssetCardError, match=r"^c\.yaml\[0\]\.model_config: expected a mapping, found ") as error:
        merge_layers(BASE, [Layer(overrides, "c.yaml[0].model_config", "card0")])

    assert error.value.name == "card0"


def test_directives_of_the_wrong_form_name_their_card() -> None:
    with pytest.raises(AssetCardError, match=r"^c\.yaml\[0\]\.model_config\._del_: ") as error:
        merge_layers(BASE, [Layer({"_del_": 1}, "c.yaml[0].model_config", "card0")])

    assert error.value.name == "card0"
