"""The names of cards that are made from the places of checkpoints."""

from __future__ import annotations

import pytest

from lading.operations.card_names import Place, check_rule, choose_names


def places(*paths: str, root: str = "data") -> list[Place]:
    depth = len(root.split("/"))
    return [Place(parts=tuple(p.split("/")), below=max(len(p.split("/")) - depth, 1)) for p in paths]


def names(rule: str, *paths: str, taken: frozenset[str] = frozenset()) -> list[str]:
    return choose_names(places(*paths), rule, lambda name: name not in taken)


def test_a_folder_gives_its_name_and_more_of_its_path_where_that_is_taken() -> None:
    assert names("folder", "data/a", "data/b/x", "data/c/x") == ["a", "b/x", "c/x"]
    assert names("folder", "data/a/b/x", "data/c/b/x") == ["a/b/x", "c/b/x"]
    assert names("folder", "data/a", taken=frozenset({"a"})) == ["data/a"]
    assert names("folder", "data/b/x", "data/c/x", taken=frozenset({"b/x"})) == ["data/b/x", "c/x"]


def test_a_path_and_a_pattern() -> None:
    assert names("path", "data/a", "data/b/x", "data") == ["a", "b/x", "data"]
    assert names("me/{folder}", "data/a", "data/b/x") == ["me/a", "me/x"]
    assert names("{parent}-{folder}", "data/b/x", "x") == ["b-x", "-x"]
    assert names("{path}", "data/b/x") == ["b/x"]
    assert names("one", "data/a", "data/b") == ["one", "one"], "who asks has to see that they are equal"


def test_names_that_cannot_be_told_apart_stay_equal() -> None:
    assert names("folder", "x", "x") == ["x", "x"]
    assert names("folder") == []


@pytest.mark.parametrize(
    "rule", ["folder", "path", "a", "{folder}", "{parent}/{path}", "{{x}}-{folder}", "{folder:>9}"]
)
def test_rules(rule: str) -> None:
    check_rule(rule)


@pytest.mark.parametrize("rule", ["", " ", "{}", "{0}", "{name}", "{folder.__class__}", "{folder[0]}", "{", "x}"])
def test_wrong_rules(rule: str) -> None:
    with pytest.raises(ValueError, match="rule for names"):
        check_rule(rule)
