from __future__ import annotations

import pytest

from lading.errors import InternalError
from lading.keymap import Rule, rename, route

RULES = (
    Rule("{rest*}.rotary_emb.inv_freq", None),
    Rule("layers.{n}.{rest*}", "model.layers.{n}.{rest}"),
    Rule("a{n}b{m}", "b{m}a{n}"),
)


def test_names_that_no_rule_matches_stand_for_themselves() -> None:
    assert rename(["lm_head.weight", "model.layers.0.w"], RULES) == ["lm_head.weight", "model.layers.0.w"]


def test_placeholders_mean_the_same_on_both_sides() -> None:
    assert rename(["layers.12.mlp.w", "a1b2"], RULES) == ["model.layers.12.mlp.w", "b2a1"]


def test_a_number_is_digits_only() -> None:
    assert rename(["layers.x.w"], RULES) == ["layers.x.w"]


def test_what_has_no_target_is_dropped() -> None:
    assert rename(["model.rotary_emb.inv_freq"], RULES) == [None]


def test_dots_are_dots() -> None:
    assert rename(["modelxrotary_emb.inv_freq"], (Rule("model.rotary_emb.inv_freq", None),)) == [
        "modelxrotary_emb.inv_freq"
    ]


def test_the_first_rule_wins() -> None:
    assert rename(["x"], (Rule("x", "y"), Rule("x", "z"))) == ["y"]


def test_a_target_cannot_use_what_the_source_does_not_name() -> None:
    with pytest.raises(InternalError, match="placeholders"):
        rename(["x"], (Rule("x", "{n}"),))


def test_all_that_does_not_fit_is_found_together() -> None:
    routed = route(["w", "v", "extra"], ["w", "v", "b"])
    assert routed.missing == ("b",)
    assert routed.unexpected == ("extra",)
    assert list(routed.targets) == [0, 1]
    assert list(routed.tensors) == [0, 1]


def test_tied_parameters_are_not_missing_and_their_copies_are_named() -> None:
    aliases = {"lm_head.weight": "embed.weight"}
    assert route(["embed.weight"], ["embed.weight"], aliases=aliases).missing == ()
    assert list(route(["lm_head.weight"], ["embed.weight"], aliases=aliases).tensors) == [0]

    both = route(["lm_head.weight", "embed.weight"], ["embed.weight"], aliases=aliases)
    assert list(both.tensors) == [1]
    assert both.duplicates == ((0, 0),)


def test_two_tensors_of_one_name_clash() -> None:
    routed = route(["x", "y"], ["y"], (Rule("x", "y"),))
    assert routed.clashes == (("y", ("x", "y")),)
