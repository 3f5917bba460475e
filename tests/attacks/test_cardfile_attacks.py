"""Card files that want to hurt: they are refused, in little time and memory, with problems that fit on a screen."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from lading.cards.card_file import CardFile, parse
from lading.cards.documents.document import MAX_BYTES, MAX_DEPTH, MAX_PROBLEMS

pytestmark = pytest.mark.timeout(60)


def refused(data: str | bytes, *, json_lines: bool = False) -> CardFile:
    """Nothing is kept; what is said is short, in lines of text that a terminal can show."""
    found = parse(data if isinstance(data, bytes) else data.encode(), source="evil.yaml", json_lines=json_lines)

    assert found.cards == found.architectures == ()
    assert found.problems != ()
    assert all(problem.startswith("evil.yaml") for problem in found.problems)
    assert all(len(problem) < 500 and problem.isprintable() for problem in found.problems)

    return found


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_a_billion_laughs() -> None:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]

    found = refused("\n".join(["name: x", "a0: &a0 lol", *levels]))

    assert len(found.problems) == MAX_PROBLEMS + 1
    assert found.problems[0] == "evil.yaml[0].a0: expected no anchor, found '&a0'"


def test_an_alias_to_itself() -> None:
    refused("name: x\na: &a [*a]\n")
    refused("&a {name: x, b: *a}\n")


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [touch evil]",
        "!!python/object/new:os.system [touch evil]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!<tag:yaml.org,2002:python/object/apply:os.system> [touch evil]",
        "!!binary aGk=",
        "!!set {a}",
        "!!timestamp 2024-09-25",
        "!evil {}",
    ],
)
def test_tags(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    found = refused(f"name: x\na: {tag}\n")

    assert found.problems[0].startswith("evil.yaml[0].a: expected no tag, found '")
    assert not list(tmp_path.iterdir())


@pytest.mark.few(3)
@pytest.mark.parametrize("depth", [MAX_DEPTH, 1_000, 200_000])
@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "[a: [", "[?"])
def test_deep_nesting(opening: str, depth: int) -> None:
    refused(opening * depth if opening in "- ? " else f"name: a\nx: {opening * depth}")


@pytest.mark.parametrize("depth", [MAX_DEPTH, 1_000, 500_000])
def test_deep_nesting_that_is_closed(depth: int) -> None:
    expected = f"expected at most {MAX_DEPTH} levels of nesting, found more"

    found = refused(f"name: a\nx: {nested(depth)}")
    assert found.problems == (f"evil.yaml[0].x{'[0]' * (MAX_DEPTH - 1)}: {expected}",)

    found = refused(f'{{"name": "a", "x": {nested(depth)}}}', json_lines=True)
    assert found.problems[0].endswith(expected)


def test_the_deepest_nesting_that_is_taken() -> None:
    deepest = nested(MAX_DEPTH - 1)

    assert parse(f"name: a\nx: {deepest}".encode(), source="x").problems == ()
    assert parse(f'{{"name": "a", "x": {deepest}}}'.encode(), source="x", json_lines=True).problems == ()


def test_deep_indentation() -> None:
    found = refused("name: a\n" + "".join(f"{' ' * i}x:\n" for i in range(1_000)))

    assert found.problems[0].endswith(f"expected at most {MAX_DEPTH} levels of nesting, found more")


@pytest.mark.parametrize("json_lines", [False, True])
def test_a_document_that_is_too_large(json_lines: bool) -> None:
    head, tail = ('{"name": "', '"}') if json_lines else ('name: "', '"')
    fill = "a" * (MAX_BYTES - len(head) - len(tail))

    found = refused(f"{head}a{fill}{tail}", json_lines=json_lines)
    assert found.problems[0].endswith("of at most 1,048,576 bytes, found 1,048,577")

    # In bytes, not in characters; and no larger than the limit it is read, and found wrong for another reason.
    found = refused(f"{head}é{fill[1:]}{tail}", json_lines=json_lines)
    assert found.problems[0].endswith("of at most 1,048,576 bytes, found 1,048,577")
    found = refused(f"{head}{fill}{tail}", json_lines=json_lines)
    assert ".name: expected a name of at most 200 characters" in found.problems[0]


def test_a_document_that_is_too_large_hides_no_other() -> None:
    found = parse(f"name: a\n---\nname: b\nx: {'x' * MAX_BYTES}\n---\nname: c\n".encode(), source="x.yaml")

    assert [card.source for card in found.cards] == ["x.yaml[0]", "x.yaml[2]"]
    assert len(found.problems) == 1


@pytest.mark.parametrize(
    "broken",
    [
        "name: [",
        "name: 'b",
        'name: "b',
        "name: b: c",
        "\tname: b",
        "}",
        "name: b\n x: c",
        "@",
        "%",
        "? ",
        "name: &b b",
        "name: *b",
        "name: !b b",
        "name: b\nname: b",
        "x: |9\n y",
        'name: "\\UFFFFFFFF"',
        'name: "\\q"',
        "name: b\x00",
        "x: " + "[" * 100,
        "a" * 2_000 + ": b",
        "- b",
    ],
)
def test_a_document_that_is_broken_hides_no_other(broken: str) -> None:
    found = parse(f"name: a\n---\n{broken}\n---\nname: c\nx: [1]\n".encode(), source="x.yaml")

    assert [(card.name, card.metadata) for card in found.cards] == [("a", {}), ("c", {"x": [1]})]
    assert all(problem.startswith("x.yaml[1]") for problem in found.problems)
    assert len(found.problems) > 0


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe\x00\x00n\x00\x00\x00",
        b"name: \xed\xa0\x80",
        b"name: \xc0\x80",
        b"name: \xf5\x80\x80\x80",
        b"name: a\x80",
        "name: a".encode("utf-16"),
    ],
)
def test_bytes_that_are_no_text(data: bytes) -> None:
    assert refused(data).problems == refused(data, json_lines=True).problems


@pytest.mark.parametrize("character", ["\0", "\x01", "\x1b", "\x7f", "\x80", "\x9b", "\ufffe", "\uffff"])
def test_characters_that_no_file_may_hold(character: str) -> None:
    found = refused(f"name: a\nx: 'b{character}'")

    assert found.problems == (f"evil.yaml[0]: line 2, column 6: expected printable characters, found {character!r}",)


@pytest.mark.parametrize(
    "text",
    [
        'name: "\\e[2Jx"',
        '"\\e[2J": x',
        'name: x\n"\\e[2J": x',
        'name: x\nx: {"\\e[2J": 1}',
        'name: x\nbase: "\\e]0;x\\a"',
        'name: x\nlicense: ["\\e[2J"]',
        'architecture: x\nfamily: y\n"\\e[2J": 1',
        'name: x\nx: "\\0\\e[2J"',
    ],
)
def test_escape_sequences_do_not_reach_the_terminal(text: str) -> None:
    refused(text)


@pytest.mark.parametrize(
    "value", ["9" * 300_000, "0x" + "f" * 300_000, "0b" + "1" * 300_000, "1_" * 300_000, "-" + "9" * 20]
)
def test_long_integers(value: str) -> None:
    expected = ".x: expected an integer of at most 64 bits, found "

    assert expected in refused(f"name: a\nx: {value}").problems[0]
    if "_" not in value and "f" not in value and "b" not in value:
        assert expected in refused(f'{{"name": "a", "x": {value}}}', json_lines=True).problems[0]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "value", ["1." + "0" * 500_000, "1" * 500_000 + "e1", "1e" + "9" * 500_000, "1_" * 250_000 + "x"]
)
def test_long_numbers_of_other_kinds(value: str) -> None:
    """They are read, or refused; neither takes more than linear time."""
    found = parse(f"name: a\nx: {value}".encode(), source="x.yaml")

    assert len(found.cards) + len(found.problems) == 1


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "unit",
    [
        "a: b\n",
        "- a\n",
        "? a\n",
        "a b\n",
        "'a'\n",
        "# a\n",
        "a,",
        '"a" ',
        "a:\n ",
        "\n",
        " ",
        "a\n\n",
        "a\u2028",
        "%a\n",
    ],
)
def test_large_documents_of_one_kind(unit: str) -> None:
    size = MAX_BYTES // 8

    for text in (unit * (size // len(unit)), f"name: [{unit * (size // len(unit))}]"):
        found = parse(text.encode(), source="x.yaml")

        assert len(found.problems) <= MAX_PROBLEMS + 1


def test_many_problems_in_one_document() -> None:
    for found in (
        refused("name: a\n" + "x: &a 1\n" * 10_000),
        refused("name: a\n" + "1: 1\n" * 10_000),
        refused('{"name": "a"' + ', "name": "a"' * 10_000 + "}", json_lines=True),
    ):
        assert len(found.problems) == MAX_PROBLEMS + 1
        assert found.problems[-1] == f"evil.yaml[0]: there are more problems than these {MAX_PROBLEMS}"

    assert len(refused("architecture: a\nfamily: b\n" + "".join(f"x{i}: 1\n" for i in range(5_000))).problems) == 1


@pytest.mark.parametrize("json_lines", [False, True])
def test_many_documents_with_problems(json_lines: bool) -> None:
    bad, good = ("x\n", '{"name": "a"}') if json_lines else ("[]\n---\n", "name: a")

    found = parse((bad * 5_000 + good).encode(), source="evil.yaml", json_lines=json_lines)

    assert [card.source for card in found.cards] == ["evil.yaml[5000]"]
    assert len(found.problems) == 1_001
    assert found.problems[-1] == "evil.yaml: 4000 more documents have problems"


def test_keys_that_python_would_not_keep_apart() -> None:
    found = parse(
        textwrap.dedent("""\
        name: a
        x: {"1": a, "True": b, "": c}
        """).encode(),
        source="x.yaml",
    )
    assert len(found.problems) == 1

    found = parse(b'name: a\n"__class__": b\n"__base_path__": /etc\n"__source__": c\n', source="x.yaml")
    assert found.cards[0].metadata == {"__class__": "b", "__base_path__": "/etc", "__source__": "c"}
    assert found.cards[0].folder is None
