"""The answer of a query, in a program and in a notebook."""

from __future__ import annotations

import pytest

from lading import QueryResult

COLUMNS = ("name", "count(*)")


def result(
    *rows: tuple[object, ...], columns: tuple[str, ...] = ("name", "count(*)"), more: bool = False
) -> QueryResult:
    return QueryResult(columns=columns, rows=list(rows), truncated=more)


def test_it_is_iterable_over_its_rows() -> None:
    found = result(("a", 1), ("b", None))
    assert len(found) == 2
    assert list(found) == found.rows
    assert [name for name, _ in found] == ["a", "b"]


def test_dictionaries_keep_all_columns() -> None:
    assert result(("a", None)).to_dicts() == [{"name": "a", "count(*)": None}]
    assert result((1, 2, 3), columns=("x", "x", "y")).to_dicts() == [{"x": 1, "x_2": 2, "y": 3}]
    assert result().to_dicts() == []


def test_pandas_takes_it_with_the_names_of_its_columns() -> None:
    pandas = pytest.importorskip("pandas", reason="no pandas: `pip install pandas`")
    frame = pandas.DataFrame(result(("a", 1), ("b", 2)))
    assert list(frame.columns) == list(COLUMNS)
    assert frame.values.tolist() == [["a", 1], ["b", 2]]
    assert list(pandas.DataFrame(result((1, 2), columns=("x", "x"))).columns) == ["x", "x"]


def test_rows_name_their_columns_as_named_tuples_do() -> None:
    # What pandas looks at; here also without it.
    assert all(isinstance(row, tuple) and row._fields == COLUMNS for row in result(("a", 1)))


def test_a_notebook_shows_a_table() -> None:
    html = result(("<b>&", None), ("\x1b[2J\u202e", b"\x01\xff"))._repr_html_()
    assert "<th>name</th><th>count(*)</th>" in html
    assert "<td>&lt;b&gt;&amp;</td><td>-</td>" in html
    assert "<td>\\x1b[2J\\u202e</td><td>01ff</td>" in html
    assert html.endswith("<p>2 rows</p>")
    assert "<th>&lt;script&gt;</th>" in result(columns=("<script>",))._repr_html_()


def test_a_notebook_shows_a_part_of_what_is_long() -> None:
    html = result(*[(str(i), "x" * 1000) for i in range(1234)])._repr_html_()
    assert html.count("<tr>") == 51
    assert "x" * 200 + "…</td>" in html
    assert html.endswith("<p>the first 50 of 1234 rows</p>")
    assert result(("a", 1), more=True)._repr_html_().endswith("<p>1 row, and there are more</p>")


def test_its_representation_is_a_line() -> None:
    assert repr(result(*[("a", 1)] * 1000, more=True)) == (
        "<QueryResult: 1000 rows, and there are more, columns name, count(*)>"
    )
    assert repr(result(columns=("a\nb",))) == "<QueryResult: 0 rows, columns a\\nb>"
