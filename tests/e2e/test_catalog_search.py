"""`lading list --search` in all its forms, with its other options."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from io import StringIO

import pytest
from click.testing import Result

Cli = Callable[..., Result]


@pytest.mark.usefixtures("cards")
def test_a_search_in_all_forms(cli: Cli) -> None:
    words = ("list", "--search", "mit tiny", "--family", "qwen")
    assert cli(*words, "-q").stdout == "tiny_child\n"
    assert [m["name"] for m in json.loads(cli(*words, "--json").stdout)] == ["tiny_child"]
    assert json.loads(cli(*words, "--nl").stdout)["license"] == "mit"
    assert [row["name"] for row in csv.DictReader(StringIO(cli(*words, "--csv").stdout))] == ["tiny_child"]
    assert cli(*words).stdout.splitlines()[1].startswith("tiny_child  qwen")


@pytest.mark.usefixtures("cards")
def test_a_search_with_other_conditions(cli: Cli) -> None:
    assert cli("list", "--search", "somebody", "-q").stdout.split() == ["tiny_arch", "tiny_unknown"]
    assert cli("list", "--search", "somebody", "--limit", "1", "-q").stdout.split() == ["tiny_arch"]
    assert cli("list", "*un*", "--search", "somebody", "-q").stdout.split() == ["tiny_unknown"]
    assert cli("list", "--search", "somebody", "--status", "remote", "-q").stdout.split() == ["tiny_arch"]
    assert cli("list", "--search", "tokenizer json", "-q").stdout == ""
    assert cli("list", "--search", "tokenizer json", "--all", "-q").stdout.split() == ["tiny_tokenizer"]


@pytest.mark.parametrize("words", ["no such words", '"', "AND NOT", "a\tb*", "(((", "'; DROP TABLE cards"])
def test_a_search_that_finds_nothing_is_no_failure(cli: Cli, words: str) -> None:
    result = cli("list", "--search", words, "--json")
    assert json.loads(result.stdout) == []
    assert "no model matches" in result.stderr
