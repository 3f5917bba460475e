from __future__ import annotations

import re

import pytest

from lading.errors import InternalError
from lading.planning.composition import Joined, Regroup, Reordered, Sliced, Stacked, Transposed, Unfolded
from lading.planning.rules import Rule, parts_of, rename, route

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


def test_a_number_with_too_many_digits_to_be_one_matches_no_rule() -> None:
    name = f"experts.{'9' * 5000}.w2"

    assert route([name], ["experts.down"], EXPERTS).unexpected == (name,)


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


# --- several tensors for one target ---

CONCATENATED = (Rule("q.{n}", "qkv.{n}", concat=(0, 0)), Rule("k.{n}", "qkv.{n}", concat=(0, 1)))
EXPERTS = (
    Rule("experts.{e}.w1", "experts.gate_up", stack="e", concat=(0, 0)),
    Rule("experts.{e}.w3", "experts.gate_up", stack="e", concat=(0, 1)),
    Rule("experts.{e}.w2", "experts.down", stack="e"),
)


def test_tensors_are_concatenated() -> None:
    routed = route(
        ["k.1", "q.0", "k.0", "q.1"],
        ["qkv.0", "qkv.1"],
        CONCATENATED,
        shapes=[(1, 3), (2, 3)] * 2,
        target_shapes=[(3, 3)] * 2,
    )
    assert routed.composed == {0: Joined(0, (1, 2)), 1: Joined(0, (3, 0))}
    assert list(routed.tensors) == [1, 3]


def test_tensors_are_stacked() -> None:
    names = ["experts.1.w1", "experts.0.w3", "experts.0.w1", "experts.1.w3", "experts.0.w2", "experts.1.w2"]
    routed = route(
        names,
        ["experts.gate_up", "experts.down"],
        EXPERTS,
        shapes=[(2, 3)] * 4 + [(3, 2)] * 2,
        target_shapes=[(2, 4, 3), (2, 3, 2)],
    )
    assert routed.composed == {0: Stacked((Joined(0, (2, 1)), Joined(0, (0, 3)))), 1: Stacked((4, 5))}


def test_a_tensor_is_cut_into_several_targets() -> None:
    rules = (
        Rule("{n}.qkv", "{n}.q", cut=(0, 0, 4)),
        Rule("{n}.qkv", "{n}.k", cut=(0, 4, 2), order=Regroup(0, 1, 2)),
        Rule("{rest*}", "other.{rest}"),
    )
    targets = ["0.q", "0.k", "1.q", "1.k", "other.x"]
    shapes = [(6, 3)] * 2 + [(5,)]

    found = route(["0.qkv", "1.qkv", "x"], targets, rules, shapes=shapes, target_shapes=[(4, 3), (2, 3)] * 2 + [(5,)])

    assert rename(["0.qkv", "x"], rules) == ["0.q", "0.k", "other.x"]
    assert list(found.targets) == [0, 1, 2, 3, 4]
    assert dict(found.composed) == {
        0: Sliced(0, 0, 4, 0),
        1: Sliced(0, 4, 2, Reordered(Regroup(0, 1, 2), 0)),
        2: Sliced(0, 0, 4, 1),
        3: Sliced(0, 4, 2, Reordered(Regroup(0, 1, 2), 1)),
    }
    assert not found.unexpected

    short = route(["0.qkv"], ["0.q", "0.k"], rules, shapes=[(5, 3)], target_shapes=[(4, 3), (2, 3)])
    assert [name for name, _ in short.incomplete] == ["0.k"]


FUSED = (
    Rule("qkv", "q", cut=(0, 0, 4)),
    Rule("qkv", "k", cut=(0, 4, 2)),
)


def test_each_rank_that_saved_a_part_holds_a_share_of_what_a_tensor_is_cut_into() -> None:
    names, targets, target_shapes = ["qkv#0", "qkv#1"], ["q", "k"], [(4, 3), (2, 3)]

    found = route(names, targets, FUSED, shapes=[(3, 3)] * 2, target_shapes=target_shapes)

    assert dict(found.composed) == {
        0: Joined(0, (Sliced(0, 0, 2, 0), Sliced(0, 0, 2, 1))),
        1: Joined(0, (Sliced(0, 2, 1, 0), Sliced(0, 2, 1, 1))),
    }
    assert not found.incomplete

    # Split along the other dim, each part has all rows; and of copies, the first is used.
    columns = route(names, targets, FUSED, shapes=[(6, 2), (6, 1)], target_shapes=target_shapes)
    assert columns.composed[1] == Joined(1, (Sliced(0, 4, 2, 0), Sliced(0, 4, 2, 1)))
    copies = route(names, targets, FUSED, shapes=[(6, 3)] * 2, target_shapes=target_shapes)
    assert copies.composed[1] == Sliced(0, 4, 2, 0)


def test_ranks_that_hold_no_equal_shares_are_reported() -> None:
    names = [f"qkv#{i}" for i in range(3)]

    found = route(names, ["q", "k"], FUSED, shapes=[(2, 3)] * 3, target_shapes=[(4, 3), (2, 3)])

    assert [name for name, _ in found.incomplete] == ["q", "k"]


def test_experts_below_one_another_are_unfolded_rank_by_rank() -> None:
    rules = (
        Rule("gate", "gate_up", concat=(2, 0), unfold=2),
        Rule("up", "gate_up", concat=(2, 1), unfold=2),
        Rule("down", "down", unfold=2),
        Rule("router", "router.weight", transpose=True),
    )
    targets, target_shapes = ["gate_up", "down", "router.weight"], [(2, 3, 8), (2, 4, 3), (2, 3)]

    whole = route(["gate", "up", "down", "router"], targets, rules,
                  shapes=[(6, 4), (6, 4), (8, 3), (3, 2)], target_shapes=target_shapes)  # fmt: skip
    assert dict(whole.composed) == {
        0: Joined(2, (Unfolded(2, 0), Unfolded(2, 1))),
        1: Unfolded(2, 2),
        2: Transposed(3),
    }

    names = [f"{name}#{rank}" for name in ("gate", "up", "down", "router") for rank in range(2)]
    shapes = [(6, 2)] * 4 + [(4, 3)] * 2 + [(3, 2)] * 2
    parts = route(names, targets, rules, shapes=shapes, target_shapes=target_shapes)
    gate, up = (Joined(2, (Unfolded(2, i), Unfolded(2, i + 1))) for i in (0, 2))
    assert dict(parts.composed) == {
        0: Joined(2, (gate, up)),
        1: Joined(1, (Unfolded(2, 4), Unfolded(2, 5))),
        2: Transposed(6),
    }
    assert not parts.incomplete

    odd = route(["down"], ["down"], rules, shapes=[(7, 3)], target_shapes=[(2, 4, 3)])
    assert odd.incomplete == (("down", "[7, 3] has no 2 equal parts along dim 0"),)


@pytest.mark.parametrize("rows", [3, 7])
def test_a_cut_to_the_end_takes_all_rows(rows: int) -> None:
    rules = (Rule("x", "y", cut=(0, 2, None), concat=(0, 0)), Rule("x", "y", cut=(0, 0, 2), concat=(0, 1)))

    found = route(["x"], ["y"], rules, shapes=[(rows, 4)], target_shapes=[(rows, 4)])

    assert dict(found.composed) == {0: Joined(0, (Sliced(0, 2, rows - 2, 0), Sliced(0, 0, 2, 0)))}


@pytest.mark.parametrize(("dim", "shape"), [(0, ()), (0, (1, 4)), (1, ()), (1, (5,)), (1, (4, 1))])
def test_a_cut_to_the_end_of_a_tensor_that_ends_before(dim: int, shape: tuple[int, ...]) -> None:
    rules = (Rule("x", "y", cut=(dim, 2, None)),)

    assert [name for name, _ in route(["x"], ["y"], rules, shapes=[shape], target_shapes=[(2, 4)]).incomplete] == ["y"]


@pytest.mark.parametrize(("rows", "failed"), [(3, ["q", "k"]), (5, ["k"])])
def test_a_cut_to_the_end_of_parts_that_ranks_saved(rows: int, failed: list[str]) -> None:
    rules = (Rule("qkv", "q", cut=(0, 0, 4)), Rule("qkv", "k", cut=(0, 4, None)))
    names, targets = ["qkv#0", "qkv#1"], ["q", "k"]

    parts = route(names, targets, rules, shapes=[(rows, 3)] * 2, target_shapes=[(4, 3), (2 * rows - 4, 3)])
    reason = "parts that ranks saved cannot be cut by a rule without a size"
    assert parts.incomplete == tuple((name, reason) for name in failed)

    # Of copies, the first is used.
    copies = route(names, targets, rules, shapes=[(6, 3)] * 2, target_shapes=[(4, 3), (2, 3)])
    assert dict(copies.composed) == {0: Sliced(0, 0, 4, 0), 1: Sliced(0, 4, 2, 0)}


@pytest.mark.parametrize(
    "rule",
    [
        Rule("x", "y", order=Regroup(0, 2, 2)),
        Rule("x", "y", cut=(0, 0, 4)),
        Rule("x", "y", unfold=2),
        Rule("x", "y", transpose=True),
    ],
)
def test_only_rules_that_join_and_stack_are_applied_backwards(rule: Rule) -> None:
    with pytest.raises(InternalError, match="not applied backwards"):
        parts_of("y", (4, 4), [rule])


def test_what_is_re_ordered_is_composed_of_one_tensor() -> None:
    order = Regroup(0, 2, 2)
    routed = route(["x"], ["y"], (Rule("x", "y", order=order),), shapes=[(8,)], target_shapes=[(8,)])
    assert routed.composed == {0: Reordered(order, 0)}

    routed = route(["x"], ["y"], (Rule("x", "y", order=order),), shapes=[(6,)], target_shapes=[(6,)])
    assert routed.incomplete == (("y", "[6] has no groups of 4 along dim 0"),)


@pytest.mark.parametrize(
    ("names", "rules", "why"),
    [
        (["q.0", "k.0"], (CONCATENATED[0], Rule("k.{n}", "qkv.{n}", concat=(0, 2))), "number 1 is missing"),
        (["experts.0.w2", "experts.999999999.w2"], EXPERTS, "number 1 is missing"),
        (["experts.0.w2", "experts.1.w2"], EXPERTS, r"\[2, 3\], \[3, 3\] cannot be stacked"),
        (["x#0", "x#2"], (Rule("x", "experts.down"),), "tensor-parallel parts, number 1 is missing"),
        (["x#0.1"], (Rule("x", "experts.down"),), "sharded parts, number 0 is missing"),
    ],
)
def test_parts_that_are_missing_or_do_not_fit(names: list[str], rules: tuple[Rule, ...], why: str) -> None:
    targets = ["qkv.0", "experts.down"]
    routed = route(names, targets, rules, shapes=[(2, 3), (3, 3)], target_shapes=[(5, 3), (2, 9, 9)])
    ((_, found),) = routed.incomplete
    assert re.search(why, found)


def test_two_tensors_of_one_place_clash() -> None:
    rules = (Rule("a", "t", concat=(0, 0)), Rule("b", "t", concat=(0, 0)), Rule("c", "t"))
    for names in (["a", "b"], ["a", "c"]):
        routed = route(names, ["t"], rules, shapes=[(1,), (1,)], target_shapes=[(2,)])
        assert routed.clashes == (("t", tuple(names)),)


def test_rules_that_contradict_each_other() -> None:
    rules = (Rule("a", "t", concat=(0, 0)), Rule("b", "t", concat=(1, 1)))
    with pytest.raises(InternalError, match="do not agree"):
        route(["a", "b"], ["t"], rules, shapes=[(1, 1)] * 2, target_shapes=[(2, 1)])


def test_a_stack_counts_by_a_placeholder_of_its_source() -> None:
    with pytest.raises(InternalError, match="placeholders"):
        route(["x"], ["y"], (Rule("x", "y", stack="e"),))


def test_a_tied_parameter_in_parts() -> None:
    names = ["embed#0", "embed#1", "head#0", "head#1"]
    routed = route(names, ["embed"], aliases={"head": "embed"}, shapes=[(2, 3)] * 4, target_shapes=[(4, 3)])
    assert routed.composed == {0: Joined(0, (0, 1))}
    assert routed.duplicates == ((0, Joined(0, (2, 3))),)


def test_ranks_that_have_no_part() -> None:
    names, shapes = ["w#0.0", "w#0.1", "w#0.2"], [(2, 3), (1, 3), (0,)]
    assert route(names, ["w"], shapes=shapes, target_shapes=[(3, 3)]).composed == {0: Joined(0, (0, 1))}
    assert route(names[:2], ["w"], shapes=shapes[:2], target_shapes=[(3, 3)]).composed == {0: Joined(0, (0, 1))}
    assert list(route(names, ["w"], shapes=[(0, 3)] * 3, target_shapes=[(0, 3)]).tensors) == [0]


def test_copies_of_a_tensor_on_all_ranks() -> None:
    routed = route(["norm#0", "norm#1"], ["norm"], shapes=[(4,)] * 2, target_shapes=[(4,)])
    assert list(routed.tensors) == [0]
    assert routed.composed == {}
