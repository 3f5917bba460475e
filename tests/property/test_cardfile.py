"""What is written is read back, and plain scalars mean what they mean to the YAML reader that fairseq2 uses."""

from __future__ import annotations

import json
import math
from datetime import date, datetime
from typing import Any

from hypothesis import assume, example, given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lading.cards.card import FIELDS, ArchitectureEntry, CardEntry, reads_as_path
from lading.cards.card_file import dump, parse

# Surrogates and NUL cannot be stored; all else that Unicode has may stand in a string.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
NASTY = st.sampled_from(
    [
        *("", " ", "\n", "\t", "a\n", "\na", "a\n\nb", " a", "a ", "\r", "\r\n", "a\rb"),
        *("~", "null", "Null", "true", "False", "yes", "No", "on", "y", "<<", "="),
        *("1", "1_0", "0x1f", "0o7", "1e5", "1e-5", ".5", ".inf", ".NaN", "2024-09-25", "12:30:45"),
        *("-", "- a", "---", "...", "--- a", "? a", ": a", "a: b", "a:", ":a", "a #b", "#a", "a,b", "a, b"),
        *("'a'", '"a"', "[a]", "{a: b}", "&a", "*a", "!a", "!!str a", "|", ">", "%YAML 1.1", "@a", "`a`", "\\", "\\n"),
        *("\u2028", "\u2029", "\x85", "\ufeff", "\x7f", "\x1b[31m", "é", "日本語", "😀", "\U0010ffff", "\ufffe"),
        *("hg://a/b", "C:\\a", "${env:A:b}"),
    ]
)
# What str.isprintable says yes to; a filter would throw away nearly all that Unicode has.
PRINTABLE: dict[str, Any] = {"exclude_categories": ["C", "Z"], "include_characters": " "}
KEY_CHARACTERS = st.characters(**PRINTABLE)
KEYS = st.one_of(
    st.text(KEY_CHARACTERS, min_size=1, max_size=30),
    NASTY.filter(lambda text: text != "" and text.isprintable()),
    st.sampled_from(["a", "'" * 200, '"' * 200, "\\" * 200]),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXT,
    NASTY,
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=20
)
NAMES = (
    st.text(st.characters(**PRINTABLE, exclude_characters="@"), min_size=1, max_size=30)
    .map(str.strip)
    .filter(lambda name: name != "" and not reads_as_path(name) and "://" not in name)
)
# Fields with rules of their own; hypothesis finds their names in the source.
RULED = {"name", *FIELDS, "tokenizer_family", "dataset_family"}
METADATA = st.dictionaries(KEYS.filter(lambda key: key not in RULED), VALUES, max_size=5)
CARDS = st.lists(
    st.builds(CardEntry, name=NAMES, env=st.just("") | NAMES, metadata=METADATA),
    max_size=4,
    unique_by=lambda card: (card.name, card.env),
)
ARCHITECTURES = st.lists(
    st.builds(
        ArchitectureEntry,
        name=NAMES,
        family=NAMES,
        base=st.none() | NAMES,
        config=st.dictionaries(KEYS, VALUES, max_size=4),
    ),
    max_size=3,
    unique_by=lambda architecture: (architecture.family, architecture.name),
)


def exact(value: object) -> object:
    """``value`` in a form in which 1, 1.0 and True differ, and 0.0 and -0.0, and the order of keys counts."""
    match value:
        case dict():
            return [(key, exact(item)) for key, item in value.items()]
        case list():
            return [exact(item) for item in value]
        case _:
            return (type(value), repr(value))


@given(CARDS, ARCHITECTURES)
def test_what_is_dumped_is_parsed_back(cards: list[CardEntry], architectures: list[ArchitectureEntry]) -> None:
    found = parse(dump(cards, architectures).encode(), source="stdin")

    assert found.problems == ()
    assert [(c.name, c.env, exact(c.metadata)) for c in found.cards] == [
        (c.name, c.env, exact(c.metadata)) for c in cards
    ]
    assert [(a.name, a.family, a.base, exact(a.config)) for a in found.architectures] == [
        (a.name, a.family, a.base, exact(a.config)) for a in architectures
    ]


@given(CARDS)
def test_what_is_dumped_is_yaml(cards: list[CardEntry]) -> None:
    """Read by a reader that is not ours: fairseq2's."""
    documents = list(YAML(typ="safe", pure=True).load_all(dump(cards)))

    assert [exact(document) for document in documents] == [
        exact({"name": f"{card.name}@{card.env}" if card.env else card.name, **card.metadata}) for card in cards
    ]


@given(CARDS)
def test_json_lines_say_the_same(cards: list[CardEntry]) -> None:
    lines = [json.dumps({"name": f"{card.name}@{card.env}", **card.metadata}) for card in cards]

    found = parse("\n".join(lines).encode(), source="stdin", json_lines=True)

    assert found.problems == ()
    assert [(c.name, c.env, exact(c.metadata)) for c in found.cards] == [
        (c.name, c.env, exact(c.metadata)) for c in cards
    ]


PLAIN = st.text("+-._0123456789abexofnINFtrue~:/", min_size=1, max_size=8)


@given(PLAIN)
@example("0b11")
@example("0o17")
@example("010")
@example("1_000")
@example("1e5")
@example("1E+5")
@example("1.e5")
@example("+.5")
@example("-0")
@example("0x_f")
@example("True")
@example("~")
def test_plain_scalars_mean_what_they_mean_to_fairseq2(text: str) -> None:
    try:
        expected = YAML(typ="safe", pure=True).load(f"x: {text}")["x"]
    except (YAMLError, ValueError, TypeError):  # also "0x_" and "+_", which ruamel takes for integers
        assume(False)
    # Dates are strings here, and `.5e5` is a number, as YAML's own schema has it; a number is finite.
    assume(not isinstance(expected, (date, datetime)) and not (isinstance(expected, str) and is_number(expected)))
    assume(not isinstance(expected, float) or math.isfinite(expected))
    assume("_" not in text or text[0].isdigit())

    found = parse(f"name: a\nx: {text}".encode(), source="stdin")

    assert found.problems == ()
    assert exact(found.cards[0].metadata["x"]) == exact(expected)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False

    return True


@given(
    st.binary(max_size=60) | st.text("ab:-#'\"[]{},&*!|>%@?~\n\r\t 1.\\<=\ufeff\x85\u2028", max_size=60).map(str.encode)
)
@example(b'name: "\\UFFFFFFFF"')
@example(b"name: !<")
@example(b"%YAML\n---\na")
@example(b"%TAG ! !\n---\na")
@example(b"--- --- ---")
@example(b"? ? ? a")
@example(b"a: |99999\n b")
@example(b"a: |\n\tb\n c")
@example(b"\xef\xbb\xbf---\n\xef\xbb\xbf")
def test_nothing_is_raised(data: bytes) -> None:
    for json_lines in (False, True):
        found = parse(data, source="stdin", json_lines=json_lines)

        for problem in found.problems:
            assert problem.startswith("stdin")
            assert problem.isprintable()
        assert len({(card.name, card.env) for card in found.cards}) == len(found.cards)
