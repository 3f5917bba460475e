"""Card files: what they say, and what is said of those that are wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lading.cards.card import ArchitectureEntry, CardEntry
from lading.cards.card_file import CardFile, dump, parse


def parse_text(text: str) -> CardFile:
    return parse(text.encode(), source="file:///cards/qwen.yaml", folder=Path("/cards"))


def field(text: str) -> object:
    """The value of the field ``x`` of a card that states ``text`` for it."""
    found = parse_text(f"name: a\nx: {text}\n")
    assert found.problems == ()

    return found.cards[0].metadata["x"]


def problems(text: str) -> list[str]:
    return list(parse_text(text).problems)


def problem(text: str) -> str:
    """The only problem of a file; nothing of it is kept."""
    found = parse_text(text)
    assert len(found.problems) == 1
    assert found.cards == found.architectures == ()

    return found.problems[0]


# --- what a file says ------------------------------------------------------------------------------------------------


def test_cards_and_architectures() -> None:
    data = b"""\
# Two models of one size.
name: qwen25_7b
model_family: qwen
checkpoint: hg://qwen/qwen2.5-7b
model_config:
  max_seq_len: 32768
---
name: qwen25_7b_instruct
base: qwen25_7b
---
architecture: qwen25_7b
family: qwen
base: qwen25_3b
config:
  model_dim: 3584
"""
    found = parse(data, source="file:///cards/qwen.yaml", folder=Path("/cards"))

    assert found == CardFile(
        source="file:///cards/qwen.yaml",
        sha256=hashlib.sha256(data).hexdigest(),
        cards=(
            CardEntry(
                name="qwen25_7b",
                metadata={
                    "model_family": "qwen",
                    "checkpoint": "hg://qwen/qwen2.5-7b",
                    "model_config": {"max_seq_len": 32768},
                },
                folder=Path("/cards"),
                source="qwen.yaml[0]",
            ),
            CardEntry(
                name="qwen25_7b_instruct",
                metadata={"base": "qwen25_7b"},
                folder=Path("/cards"),
                source="qwen.yaml[1]",
            ),
        ),
        architectures=(
            ArchitectureEntry(
                name="qwen25_7b",
                family="qwen",
                base="qwen25_3b",
                config={"model_dim": 3584},
                source="qwen.yaml[2]",
            ),
        ),
        problems=(),
    )


@pytest.mark.parametrize(
    ("source", "label", "expected"),
    [
        ("file:///a/b.yaml", None, "b.yaml[0]"),
        ("package:lading.seeds/qwen.yaml", None, "qwen.yaml[0]"),
        ("stdin", None, "stdin[0]"),
        ("stdin", "mine", "mine[0]"),
    ],
)
def test_entries_say_where_they_come_from(source: str, label: str | None, expected: str) -> None:
    assert parse(b"name: a", source=source, label=label).cards[0].source == expected


@pytest.mark.parametrize(
    ("stated", "name", "env"),
    [
        ("a", "a", ""),
        ("a@", "a", ""),
        ("a@user", "a", "user"),
        ("' a @ user '", "a", "user"),
        ("'  a  '", "a", ""),
        ("qwen3_0.6b", "qwen3_0.6b", ""),
        ("a b/c", "a b/c", ""),
        ("名前", "名前", ""),
        ("'1'", "1", ""),
    ],
)
def test_names(stated: str, name: str, env: str) -> None:
    card = parse_text(f"name: {stated}").cards[0]

    assert (card.name, card.env) == (name, env)


def test_white_space_around_a_base() -> None:
    assert parse_text("name: a\nbase: ' b '").cards[0].base == "b"


def test_a_null_takes_back_what_the_base_says() -> None:
    card = parse_text("name: a\nbase: null\ncheckpoint: ~\nmodel_config:\n").cards[0]

    assert card.metadata == {"base": None, "checkpoint": None, "model_config": None}
    assert card.base is None


def test_a_card_may_have_a_field_named_architecture() -> None:
    found = parse_text("name: a\narchitecture: decoder")

    assert found.cards[0].metadata == {"architecture": "decoder"}
    assert found.architectures == ()


def test_an_architecture_may_state_nothing_but_its_names() -> None:
    assert parse_text("architecture: a\nfamily: b").architectures == (
        ArchitectureEntry(name="a", family="b", config={}, source="qwen.yaml[0]"),
    )


def test_two_families_may_have_architectures_of_one_name() -> None:
    found = parse_text("architecture: 7b\nfamily: llama\n---\narchitecture: 7b\nfamily: mistral\n")

    assert [(a.family, a.name) for a in found.architectures] == [("llama", "7b"), ("mistral", "7b")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "---\n",
        "# nothing\n",
        "---\n# nothing\n---\n--- # nothing\n...\n---\n",
        "\ufeff",
        "%YAML 1.2\n---\n",
    ],
)
def test_empty_files(text: str) -> None:
    found = parse_text(text)

    assert found.cards == found.architectures == found.problems == ()


@pytest.mark.parametrize(
    "text",
    [
        "name: a\n---\nname: b\n",
        "---\nname: a\n---\nname: b\n---\n",
        "# x\n---\n# y\nname: a\n---\n# z\n---\nname: b\n",
        "--- {name: a}\n--- {name: b}",
        "name: a\n...\nname: b\n...\n",
        "%YAML 1.2\n---\nname: a\n...\n%YAML 1.2 # again\n---\nname: b\n",
        "\ufeffname: a\r\n---\r\nname: b\r\n",
        "name: a\r---\rname: b",
        "name: 'a'\n--- # x\n\"name\": b",
    ],
)
def test_documents_are_numbered_from_0_without_the_empty_ones(text: str) -> None:
    found = parse_text(text)

    assert found.problems == ()
    assert [(card.name, card.source) for card in found.cards] == [("a", "qwen.yaml[0]"), ("b", "qwen.yaml[1]")]


def test_only_a_line_of_its_own_is_a_marker() -> None:
    assert field("a ---b") == "a ---b"
    assert field("|\n  ---\n  ...\n") == "---\n...\n"
    assert field('"a\n  --- b"') == "a --- b"
    assert parse_text("name: a\n----: b\n").cards[0].metadata == {"----": "b"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e+6", 1e6),
        ("1_000.5", 1000.5),
        (".5", 0.5),
        ("-1.", -1.0),
        ("10", 10),
        ("-10", -10),
        ("+10", 10),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b11", 3),
        ("128_256", 128256),
        (str(2**63 - 1), 2**63 - 1),
        (str(-(2**63)), -(2**63)),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("2024-09-25", "2024-09-25"),
        ("2024-09-25T10:00:00Z", "2024-09-25T10:00:00Z"),
        ("12:30", "12:30"),
        ("1.2.3", "1.2.3"),
        ("7b", "7b"),
        ("e5", "e5"),
        ("tRUE", "tRUE"),
        ("=", "="),
        ("'1'", "1"),
        ('"true"', "true"),
        ("'~'", "~"),
        ("[]", []),
        ("[1, [a], {b: 2}]", [1, ["a"], {"b": 2}]),
        ("{}", {}),
        ("|\n  a\n  b\n", "a\nb\n"),
        (">-\n  a\n  b\n", "a b"),
        ('"\\u00e9\\t\\x41"', "é\tA"),
        ("hg://qwen/qwen3-0.6b", "hg://qwen/qwen3-0.6b"),
    ],
)
def test_values(text: str, value: object) -> None:
    found = field(text)

    assert found == value
    assert type(found) is type(value)


def test_json_lines() -> None:
    lines = [
        '{"name": "a", "x": [1, 2.5, null, true]}',
        "",
        '{"architecture": "b", "family": "c", "config": {"d": 1}}\r',
        '{"name": "a@user", "y": "\u2028"}',
    ]

    found = parse("\n".join(lines).encode(), source="file:///cards/mine.jsonl", json_lines=True)

    assert found.problems == ()
    assert [(card.name, card.env, card.metadata, card.source) for card in found.cards] == [
        ("a", "", {"x": [1, 2.5, None, True]}, "mine.jsonl[0]"),
        ("a", "user", {"y": "\u2028"}, "mine.jsonl[2]"),
    ]
    assert [(a.name, a.config) for a in found.architectures] == [("b", {"d": 1})]


# --- what is wrong with one ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nmae: a", "qwen.yaml[0]: expected a field 'name', found 'nmae'"),
        (
            "x: a",
            "qwen.yaml[0]: expected a field 'name', found none; only architectures have no name, but an 'architecture'",
        ),
        ("name: 7", "qwen.yaml[0].name: expected a string, found 7 (put it in quotes)"),
        ("name:", "qwen.yaml[0].name: expected a string, found null"),
        ("name: [a]", "qwen.yaml[0].name: expected a string, found a list"),
        ("name: ''", "qwen.yaml[0].name: expected a name, found an empty one"),
        ("name: ' @user'", "qwen.yaml[0].name: expected a name, found an empty one"),
        ("name: a@b@c", "qwen.yaml[0].name: expected 'name' or 'name@environment', found 'a@b@c'"),
        ("name: 'a\u00a0b'", "qwen.yaml[0].name: expected a name of printable characters, found 'a\\xa0b'"),
        ('name: "a\\eb"', "qwen.yaml[0].name: expected a name of printable characters, found 'a\\x1bb'"),
        ("name: ./a", "qwen.yaml[0].name: expected a name that is neither a path nor an address, found './a'"),
        ("name: /a@b", "qwen.yaml[0].name: expected a name that is neither a path nor an address, found '/a'"),
        ("name: ~a", "qwen.yaml[0].name: expected a name that is neither a path nor an address, found '~a'"),
        (
            "name: hg://a/b",
            "qwen.yaml[0].name: expected a name that is neither a path nor an address, found 'hg://a/b'",
        ),
        (
            "name: a\nbase: ../b",
            "qwen.yaml[0].base: expected a name that is neither a path nor an address, found '../b'",
        ),
        (f"name: {'a' * 201}", "qwen.yaml[0].name: expected a name of at most 200 characters, found 201"),
        (f"name: a@{'b' * 201}", "qwen.yaml[0].name: expected a name of at most 200 characters, found 201"),
        ("name: a\nbase: b@user", "qwen.yaml[0].base: expected a name without @, found 'b@user'"),
        ("name: a\nbase: ''", "qwen.yaml[0].base: expected a name, found an empty one"),
        ("name: a\nbase: 1", "qwen.yaml[0].base: expected a string, found 1 (put it in quotes)"),
        ("name: a\nmodel_arch: 7", "qwen.yaml[0].model_arch: expected a string, found 7 (put it in quotes)"),
        ("name: a\ncheckpoint: [b]", "qwen.yaml[0].checkpoint: expected a string, found a list"),
        ("name: a\nlicense: true", "qwen.yaml[0].license: expected a string, found true (put it in quotes)"),
        ("name: a\nmodel_config: b", "qwen.yaml[0].model_config: expected a mapping, found 'b'"),
        (
            "name: a\nmodel_config_overrides: []",
            "qwen.yaml[0].model_config_overrides: expected a mapping, found a list",
        ),
        ("- name: a", "qwen.yaml[0]: expected a mapping with the fields of a card, found a list"),
        ("null", "qwen.yaml[0]: expected a mapping with the fields of a card, found null"),
        ("architecture: a", "qwen.yaml[0]: expected a field 'family', found none"),
        ("architecture: a\nfamily: b\nconfig: 1", "qwen.yaml[0].config: expected a mapping, found 1"),
        ("architecture: a@b\nfamily: c", "qwen.yaml[0].architecture: expected a name without @, found 'a@b'"),
        (
            "architecture: a\nfamily: b\nconfigs: {}",
            "qwen.yaml[0]: expected the fields architecture, family, base, config and no others, found 'configs'. "
            "Did you mean 'config'?",
        ),
        ("name: a\nname: b", "qwen.yaml[0].name: expected every key once, found it twice"),
        ("name: a\nx: [{y: 1, y: 2}]", "qwen.yaml[0].x[0].y: expected every key once, found it twice"),
        ("name: a\nx:\n  'é ü': {b: 1, b: 2}", "qwen.yaml[0].x.'é ü'.b: expected every key once, found it twice"),
        ("name: a\nx: &b 1", "qwen.yaml[0].x: expected no anchor, found '&b'"),
        ("name: a\nx: *b", "qwen.yaml[0].x: expected the value itself, found the alias '*b'"),
        ("name: a\nx: !!str 1", "qwen.yaml[0].x: expected no tag, found '!!str'"),
        ("name: a\nx: ! 1", "qwen.yaml[0].x: expected no tag, found '!'"),
        ("name: a\n<<: {x: 1}", "qwen.yaml[0]: expected no merge key, found <<"),
        ("name: a\n1: x", "qwen.yaml[0]: expected keys that are strings, found 1 (put it in quotes)"),
        ("name: a\nx: {~: 1}", "qwen.yaml[0].x: expected keys that are strings, found null (put it in quotes)"),
        ("name: a\n? [b]\n: x", "qwen.yaml[0]: expected keys that are strings, found a list"),
        ("name: a\n'': x", "qwen.yaml[0]: expected keys of 1 to 200 printable characters, found ''"),
        ("name: a\nx: .inf", "qwen.yaml[0].x: expected a finite number, found inf"),
        ("name: a\nx: -.inf", "qwen.yaml[0].x: expected a finite number, found -inf"),
        ("name: a\nx: .NaN", "qwen.yaml[0].x: expected a finite number, found nan"),
        ("name: a\nx: 1e400", "qwen.yaml[0].x: expected a finite number, found inf"),
        (f"name: a\nx: {2**63}", f"qwen.yaml[0].x: expected an integer of at most 64 bits, found {2**63}"),
        (
            f"name: a\nx: {10**400}",
            "qwen.yaml[0].x: expected an integer of at most 64 bits, found an integer of more than 64 bits",
        ),
        ('name: a\nx: "b\\0"', "qwen.yaml[0].x: expected text without NUL and unpaired surrogates, found 'b\\x00'"),
        ("name: a\nx: \x07", "qwen.yaml[0]: line 2, column 4: expected printable characters, found '\\x07'"),
        ("%YAML 1.1\n---\nname: a", "qwen.yaml[0]: line 2: expected no directive but %YAML 1.2, found '%YAML 1.1'"),
        ("%TAG ! b\n---\nname: a", "qwen.yaml[0]: line 2: expected no directive but %YAML 1.2, found '%TAG ! b'"),
    ],
)
def test_problems(text: str, expected: str) -> None:
    assert problem(text) == expected


def test_syntax_errors_say_where() -> None:
    assert problem("# x\n---\nname: a\nx: y: z\n").startswith("qwen.yaml[0]: line 4, column 5: expected YAML, found ")
    assert problem("name: [a\n").startswith("qwen.yaml[0]: line 2, column 1: expected YAML, found ")


def test_text_that_is_not_utf_8() -> None:
    found = parse("name: a\nx: é\n".encode("latin-1"), source="qwen.yaml")

    assert found.problems == ("qwen.yaml: line 2: expected text in UTF-8, found the byte 0xe9 at offset 11",)
    assert parse("name: a".encode("utf-16"), source="qwen.yaml").problems != ()


def test_all_that_is_wrong_is_said_at_once() -> None:
    text = """\
name: a
checkpoint: 1
model_config: []
base: x@y
---
name: b
---
name: [
---
name: c
x: *y
y: &z 1
---
name: b
---
name: b@user
"""
    found = parse_text(text)

    assert [card.source for card in found.cards] == ["qwen.yaml[1]", "qwen.yaml[5]"]
    assert [line.split(":")[0] for line in found.problems] == [
        "qwen.yaml[0].checkpoint",
        "qwen.yaml[0].model_config",
        "qwen.yaml[0].base",
        "qwen.yaml[2]",
        "qwen.yaml[3].x",
        "qwen.yaml[3].y",
        "qwen.yaml[4].name",
    ]
    assert found.problems[-1].endswith("found that qwen.yaml[1] has it, too")


def test_architectures_come_once_per_family() -> None:
    found = parse_text("architecture: a\nfamily: b\n---\narchitecture: a\nfamily: b\n---\narchitecture: a\nfamily: c\n")

    assert len(found.architectures) == 2
    assert found.problems == (
        "qwen.yaml[1].architecture: expected every architecture of a family once in a file, found that qwen.yaml[0] is "
        "'a', too",
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2, column 2: expected JSON, found an error: Expecting property name enclosed in double quotes"),
        ("name: a", "line 2, column 1: expected JSON, found an error: Expecting value"),
        ("[1]", "expected a mapping with the fields of a card, found a list"),
        ('{"name": "b"} {}', "line 2, column 15: expected JSON, found an error: Extra data"),
        ('{"name": "b", "x": NaN}', ".x: expected a finite number, found nan"),
        ('{"name": "b", "x": [1E999]}', ".x[0]: expected a finite number, found inf"),
        ('{"name": "b", "x": 9223372036854775808}', ".x: expected an integer of at most 64 bits, found 92233720368547"),
        ('{"name": "b", "x": {"y": 1, "y": 1}}', ".x.y: expected every key once, found it twice"),
        ('{"name": "b", "x": "\\ud800"}', ".x: expected text without NUL and unpaired surrogates, found '\\ud800'"),
        ('{"name": "b", "\\u0000": 1}', "expected keys of 1 to 200 printable characters, found '\\x00'"),
        ('{"name": "a"}', ".name: expected every name once in a file, found that mine.jsonl[0] has it, too"),
    ],
)
def test_problems_of_json_lines(line: str, expected: str) -> None:
    found = parse(f'{{"name": "a"}}\n{line}\n'.encode(), source="mine.jsonl", json_lines=True)

    assert [card.name for card in found.cards] == ["a"]
    assert len(found.problems) == 1
    assert found.problems[0].startswith(f"mine.jsonl[1]{'' if expected[0] == '.' else ': '}{expected}")


# --- back to YAML ----------------------------------------------------------------------------------------------------


def test_dump() -> None:
    text = dump(
        [
            CardEntry(
                name="a",
                env="user",
                metadata={
                    "checkpoint": "hg://qwen/qwen3-0.6b",
                    "date": "2024-09-25",
                    "empty": {},
                    "no": "no",
                    "note": "größer: so",
                    "model_config": {"norm_eps": 1e-05, "layers": [1, 2.0, None, [True, []], {"b": "c d", "e": "7b"}]},
                },
            ),
            CardEntry(name="b", metadata={}),
        ],
        [ArchitectureEntry(name="7b", family="llama", config={"model_dim": 4096})],
    )

    assert (
        text
        == """\
architecture: "7b"
family: llama
config:
  model_dim: 4096

---

name: a@user
checkpoint: hg://qwen/qwen3-0.6b
date: "2024-09-25"
empty: {}
"no": "no"
note: "größer: so"
model_config:
  norm_eps: 1e-05
  layers:
    - 1
    - 2.0
    - null
    - - true
      - []
    - b: c d
      e: "7b"

---

name: b
"""
    )


def test_nothing_to_dump() -> None:
    assert dump([]) == ""


@pytest.mark.parametrize("value", [{1, 2}, b"", object(), float("nan"), (1,)])
def test_only_plain_values_are_dumped(value: object) -> None:
    with pytest.raises(TypeError, match="expected a plain value"):
        dump([CardEntry(name="a", metadata={"x": value})])
