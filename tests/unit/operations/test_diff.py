"""In what two checkpoints or architectures differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lading.operations.diff import Change, DiffReport, Side, diff
from tests.helpers.catalog_tools import make_manifest

Tensors = dict[str, tuple[str | None, tuple[int, ...]]]


def side(tensors: Tensors, digests: dict[str, str] | None = None, **config: object) -> Side:
    return Side(
        names=list(tensors),
        dtypes=[dtype for dtype, _ in tensors.values()],
        shapes=[shape for _, shape in tensors.values()],
        digests=digests or {},
        config=config,
    )


def rows(report: DiffReport) -> list[tuple[str, str, object, object]]:
    return [(c.name, c.kind, c.a, c.b) for c in report.changes]


def test_names_shapes_and_dtypes() -> None:
    a = side({"same": ("F32", (1,)), "gone": ("F32", (2,)), "cast": ("F32", (3,)), "cut": ("F32", (4,))})
    b = side({"new": ("I8", ()), "cut": ("F16", (2, 2)), "cast": ("BF16", (3,)), "same": ("F32", (1,))})

    report = diff(a, b)

    assert rows(report) == [
        ("gone", "only in A", {"dtype": "F32", "shape": (2,)}, None),
        ("cast", "dtype", "F32", "BF16"),
        ("cut", "shape", (4,), (2, 2)),
        ("cut", "dtype", "F32", "F16"),
        ("new", "only in B", None, {"dtype": "I8", "shape": ()}),
    ]
    assert (report.same, report.equal, report.unknown) == (1, 0, 1)


def test_values_where_both_digests_are_known() -> None:
    tensors: Tensors = dict.fromkeys(("equal", "other", "unknown", "neither", "cast", "cut"), ("F32", (4,)))
    a = side(tensors, {"equal": "x", "other": "x", "unknown": "x", "cast": "x", "cut": "x"})
    b = side(
        {**tensors, "cast": ("I32", (4,)), "cut": ("F32", (2, 2))},
        {"equal": "x", "other": "y", "cast": "y", "cut": "y"},
    )

    report = diff(a, b)

    assert rows(report) == [
        ("other", "values", "x", "y"),
        ("cast", "dtype", "F32", "I32"),
        ("cut", "shape", (4,), (2, 2)),
    ]
    assert (report.same, report.equal, report.unknown) == (4, 1, 2)


def test_renamed_tensors() -> None:
    f = ("F32", (4,))
    a = side({"a1": f, "kept": f, "a3": f, "a4": f}, {"a1": "x", "kept": "y", "a4": "z"})
    b = side(
        {"b0": ("I32", (4,)), "b1": f, "kept": f, "b4": ("F32", (2, 2)), "b5": f},
        {"b0": "x", "b1": "x", "kept": "y", "b4": "z"},
    )

    assert rows(diff(a, b)) == [
        ("a1", "renamed", "a1", "b1"),
        ("a3", "only in A", {"dtype": "F32", "shape": (4,)}, None),
        ("a4", "only in A", {"dtype": "F32", "shape": (4,)}, None),
        ("b0", "only in B", None, {"dtype": "I32", "shape": (4,)}),
        ("b4", "only in B", None, {"dtype": "F32", "shape": (2, 2)}),
        ("b5", "only in B", None, {"dtype": "F32", "shape": (4,)}),
    ]


@pytest.mark.parametrize(("ours", "theirs"), [("ab", "cd"), ("ab", "c"), ("a", "cd")])
def test_which_of_several_equal_tensors_was_renamed_is_not_guessed(ours: str, theirs: str) -> None:
    f = ("F32", (4,))
    a, b = (side(dict.fromkeys(names, f), dict.fromkeys(names, "x")) for names in (ours, theirs))

    assert [(name, kind) for name, kind, _, _ in rows(diff(a, b))] == [
        *((name, "only in A") for name in ours),
        *((name, "only in B") for name in theirs),
    ]


def test_a_prefix_tells_equal_tensors_apart() -> None:
    """Only one that another tensor changed, too, and only if it leaves no choice."""
    f = ("F32", (4,))
    norms = [f"layers.{i}.norm" for i in range(3)]
    digests = {**dict.fromkeys(norms, "ones"), "layers.0.w": "w", "head.w": "h", "odd.norm": "ones"}
    new_names = {**{name: f"model.{name}" for name in digests}, "head.w": "out.w", "odd.norm": "even.norm"}
    a = side(dict.fromkeys(digests, f), digests)
    b = side(dict.fromkeys(new_names.values(), f), {new_names[name]: digest for name, digest in digests.items()})

    report = diff(a, b)
    assert {c.name: c.b for c in report.changes if c.kind == "renamed"} == {
        name: new for name, new in new_names.items() if name != "odd.norm"
    }
    assert report.prefix_changes() == {("", "model."): [*norms, "layers.0.w"]}
    assert {c.name for c in diff(b, a).changes if c.kind == "renamed"} == {
        new for name, new in new_names.items() if name != "odd.norm"
    }

    # Two prefixes that both fit are no reason to choose one.
    more = {**digests, "layers.1.w": "w1"}
    names = {**new_names, "layers.1.w": "aux.layers.1.w"}
    twice = {**{names[n]: d for n, d in more.items()}, "aux.layers.1.norm": "ones"}
    report = diff(side(dict.fromkeys(more, f), more), side(dict.fromkeys(twice, f), twice))
    assert ("layers.1.norm", "only in A") in {(c.name, c.kind) for c in report.changes}


def test_configurations() -> None:
    a = side({}, dim=1, norm=True, rope={"theta": 1.0, "scale": None}, window=None, only=3)
    b = side({}, dim=2, norm=True, rope={"theta": 1.0, "scale": {"factor": 2}}, window=4, other=[1])

    assert diff(a, b).changes == (
        Change(name="dim", kind="config", a=1, b=2),
        Change(name="rope.scale", kind="config", a=None, b={"factor": 2}),
        Change(name="window", kind="config", a=None, b=4),
        Change(name="only", kind="config", a=3, b=None),
        Change(name="other", kind="config", a=None, b=[1]),
    )


def test_a_dtype_that_is_not_stated_differs_from_nothing() -> None:
    report = diff(side({"w": (None, (1,)), "n": ("I64", ())}), side({"w": ("F32", (1,)), "n": ("I64", ())}))
    assert (report.changes, report.same) == ((), 2)


def test_manifests() -> None:
    a = make_manifest(6, 2)
    b = replace(a, names=[*a.names[:5], "other"])
    digests = dict.fromkeys((*a.names, "other"), "x")

    assert not diff(Side.of_manifest(a), Side.of_manifest(make_manifest(6, 3))).changes
    assert rows(diff(Side.of_manifest(a, digests), Side.of_manifest(b, digests))) == [
        (a.names[5], "renamed", a.names[5], "other")
    ]


NAMES = st.sampled_from("abcdef")
SIDES = st.builds(
    side,
    st.dictionaries(NAMES, st.tuples(st.sampled_from(["F32", "I8"]), st.sampled_from([(), (1,), (2, 1)]))),
    st.dictionaries(NAMES, st.sampled_from("xyz")),
    dim=st.integers(0, 1),
)
MIRROR = {"only in A": "only in B", "only in B": "only in A"}


@given(SIDES, SIDES)
def test_the_other_way_round(a: Side, b: Side) -> None:
    forth, back = diff(a, b), diff(b, a)

    def key(row: tuple[str, str, object, object]) -> str:
        return repr(row)

    mirrored = [(n if k != "renamed" else str(y), MIRROR.get(k, k), y, x) for n, k, x, y in rows(forth)]
    assert (forth.same, forth.equal, forth.unknown) == (back.same, back.equal, back.unknown)
    assert sorted(mirrored, key=key) == sorted(rows(back), key=key)
    assert not diff(a, a).changes


@given(SIDES, SIDES)
def test_every_tensor_is_accounted_for(a: Side, b: Side) -> None:
    report = diff(a, b)
    kinds = [c.kind for c in report.changes]
    shaped = {c.name for c in report.changes if c.kind in ("shape", "dtype")}

    assert len(a.names) == report.same + len(shaped) + kinds.count("only in A") + kinds.count("renamed")
    assert len(b.names) == report.same + len(shaped) + kinds.count("only in B") + kinds.count("renamed")
    assert report.same == report.equal + report.unknown + kinds.count("values")
