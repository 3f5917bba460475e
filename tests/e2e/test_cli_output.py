"""How rows and errors are written, whatever the command."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lading.cli import output
from lading.cli.failure import report
from lading.cli.output import Column, Form, fit_widths, printable, shorten, write_rows
from lading.errors import (
    AssetNotFoundError,
    CardFileError,
    CatalogError,
    CheckpointNotFoundError,
    FetchError,
    GangError,
    LadingError,
    ModelGatedError,
)
from lading.system.display import human_bytes, human_count


class TestForms:
    columns = ("name", "bytes", "extra")
    rows = [("a", 1, None), ("b\nc", 2, {"k": [True]})]

    def written(self, form: Form, capsys: pytest.CaptureFixture[str]) -> str:
        write_rows(self.columns, self.rows, form)
        return capsys.readouterr().out

    def test_json_is_one_array(self, capsys):
        assert json.loads(self.written(Form.JSON, capsys)) == [
            {"name": "a", "bytes": 1, "extra": None},
            {"name": "b\nc", "bytes": 2, "extra": {"k": [True]}},
        ]

    def test_lines_are_objects(self, capsys):
        first, second = self.written(Form.LINES, capsys).splitlines()
        assert json.loads(first)["name"] == "a"
        assert json.loads(second)["extra"] == {"k": [True]}

    def test_csv_reads_back(self, capsys):
        read = list(csv.reader(io.StringIO(self.written(Form.CSV, capsys), newline="")))
        assert read == [["name", "bytes", "extra"], ["a", "1", ""], ["b\\nc", "2", '{"k": [true]}']]

    def test_names_are_the_first_column(self, capsys):
        write_rows(("n", "m"), [("x", 1), ("y", 2), (None, 3)], Form.NAMES)
        assert capsys.readouterr().out == "x\ny\n\n"

    def test_a_name_is_a_line_and_steers_no_terminal_behind_a_pipe(self, capsys):
        for form in (Form.NAMES, Form.CSV):
            write_rows(("n",), [("a\x1b[2Jb\nc",)], form)
            assert capsys.readouterr().out.splitlines()[-1] == r"a\x1b[2Jb\nc"
        output.write_json("a\x9b")
        assert capsys.readouterr().out == '"a\\u009b"\n'

    def test_a_table_keeps_each_row_on_one_line(self, capsys):
        assert self.written(Form.TABLE, capsys).splitlines() == [
            "name  bytes  extra",
            "a         1  -",
            'b\\nc      2  {"k": [true]}',
        ]

    @pytest.mark.parametrize("form", list(Form))
    def test_no_rows(self, form, capsys):
        write_rows(self.columns, [], form)
        expected = {Form.JSON: "[]\n", Form.CSV: "name,bytes,extra\n"}
        assert capsys.readouterr().out == expected.get(form, "")

    def test_columns_of_one_name_stay_apart_in_objects(self, capsys):
        write_rows(("a", "a", "a_2"), [(1, 2, 3)], Form.LINES)
        assert json.loads(capsys.readouterr().out) == {"a": 1, "a_2": 2, "a_2_2": 3}

    def test_what_json_lacks(self, capsys):
        write_rows(("a",), [(float("inf"),), (b"\x00\xff",), (Path("/x"),), (frozenset("ba"),)], Form.JSON)
        assert [row["a"] for row in json.loads(capsys.readouterr().out)] == [None, "00ff", "/x", ["a", "b"]]


class TestTerminal:
    @pytest.fixture(autouse=True)
    def _terminal(self, monkeypatch):
        monkeypatch.setattr(output, "_is_terminal", lambda: True)
        monkeypatch.setenv("COLUMNS", "30")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)

    def lines(self, capsys, *args, **kwargs) -> list[str]:
        write_rows(*args, Form.TABLE, **kwargs)
        return [click.unstyle(line) for line in capsys.readouterr().out.splitlines()]

    def test_a_table_fits_the_width(self, capsys):
        lines = self.lines(capsys, ("name", "text"), [("short", "x" * 100), ("short", "y")])
        assert lines == ["name   text", "short  " + "x" * 22 + "…", "short  y"]

    def test_a_kept_column_is_shortened_last(self, capsys):
        table = (Column(name="name", keep=True), Column(name="text"))
        lines = self.lines(capsys, ("name", "text"), [("n" * 20, "t" * 20)], table=table)
        assert lines[1] == "n" * 20 + "  " + "t" * 7 + "…"

    def test_wide_characters_cover_two_cells(self, capsys):
        lines = self.lines(capsys, ("name", "text"), [("日本語モデル" * 5, "e\u0301"), ("a", "b")])
        assert all(output.display_width(line) <= 30 for line in lines)
        assert output.display_width(lines[1].partition("e\u0301")[0]) == lines[2].index("b")

    def test_more_columns_than_cells(self, capsys):
        names = tuple(f"c{i}" for i in range(50))
        assert all(len(line) <= 30 for line in self.lines(capsys, names, [tuple(range(50))]))

    def test_columns_without_room_are_left_out_before_the_first_cannot_be_read(self, capsys):
        names = ("name", "family", "size")
        row = ("a_name_of_a_model", "a_family_of_some_kind", "1.2 GB")
        assert self.lines(capsys, names, [row]) == ["name               family", "a_name_of_a_model  a_family_o…"]
        assert self.lines(capsys, names, [("n" * 40, *row[1:])])[1] == "n" * 29 + "…"

    def test_terminal_controls_are_shown_not_obeyed(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        write_rows(("name",), [("\x1b]0;title\x07\u202eevil\x9b31m",)], Form.TABLE)
        shown = click.unstyle(capsys.readouterr().out)
        assert shown.isascii()
        assert "\\x1b]0;" in shown
        assert "\\u202e" in shown

    @pytest.mark.parametrize("form", [form for form in Form if form is not Form.TABLE])
    def test_terminal_controls_are_not_obeyed_in_any_form(self, capsys, form):
        name = "\x1b]0;title\x07\u202eevil\x9b31m"
        write_rows(("name",), [(name,)], form)
        written = capsys.readouterr().out
        assert written.replace("\n", "").isprintable()
        if form is Form.LINES:
            assert json.loads(written) == {"name": name}

    def test_color_is_for_terminals_that_want_it(self, capsys, monkeypatch):
        table = (Column(name="name", color=lambda _: "red"),)

        def written() -> str:
            write_rows(("name",), [("a",)], Form.TABLE, table=table)
            return capsys.readouterr().out

        assert "\x1b[31ma" in written()
        monkeypatch.setenv("NO_COLOR", "1")
        assert written() == "name\na\n"
        monkeypatch.delenv("NO_COLOR")
        monkeypatch.setenv("TERM", "dumb")
        assert written() == "name\na\n"


@pytest.mark.parametrize(
    ("widths", "total", "keep", "expected"),
    [
        ([5, 5], 20, [False, False], [5, 5]),
        ([30, 10], 30, [False, False], [20, 10]),
        ([30, 30, 4], 44, [False, False, False], [20, 20, 4]),
        ([30, 30, 4], 45, [False, False, False], [20, 21, 4]),
        ([30, 30], 40, [True, False], [30, 10]),
        ([30, 30], 20, [True, False], [14, 6]),
        ([9, 9, 9], 6, [True, False, False], [2, 2, 2]),
        ([9, 9], 0, [False, False], [1, 1]),
    ],
)
def test_fit_widths(widths, total, keep, expected):
    assert fit_widths(widths, total, keep) == expected


@pytest.mark.parametrize(
    ("string", "width", "expected"),
    [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("abc", 1, "…"), ("abc", 0, ""), ("日本", 3, "日…"), ("日本", 4, "日本")],
)
def test_shorten(string, width, expected):
    assert shorten(string, width) == expected


def test_human_numbers():
    assert [human_bytes(n) for n in (None, 0, 999, 1000, 1_503_300_328, 999_999, 140_000_000_000)] == [
        "-", "0 B", "999 B", "1 kB", "1.5 GB", "1 MB", "140 GB",
    ]  # fmt: skip
    assert [human_count(n) for n in (None, 7, 596_049_920, 7_615_616_512)] == ["-", "7", "596M", "7.62B"]


def test_printable():
    assert printable("naïve 日本") == "naïve 日本"
    assert printable("a\tb\x7f\udc80") == "a\\tb\\x7f\\udc80"


class TestFailures:
    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (AssetNotFoundError("x"), 2, "No card named 'x'"),
            (CheckpointNotFoundError("/x", "No checkpoint is at /x"), 2, "No checkpoint is at /x"),
            (FetchError("no route"), 5, "no route"),
            (CatalogError("damaged\nand more"), 6, "damaged"),
            (ModelGatedError("x", None), 7, "'x' is a gated model"),
            (GangError("rank 1"), 8, "rank 1"),
            (LadingError(""), 1, "LadingError"),
            (FileNotFoundError(2, "No such file or directory", "/nope"), 2, "No such file or directory: /nope"),
            (PermissionError(13, "Permission denied", "/no"), 8, "Permission denied: /no"),
            (OSError("odd"), 8, "odd"),
            (MemoryError(), 8, "Out of memory"),
            (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 8, "CUDA out of memory"),
            (click.UsageError("wrong\n  thing"), 2, "wrong thing"),
            (click.ClickException("odd"), 1, "odd"),
            (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero (this is a bug in lading; run again with"),
            (AssertionError(), 1, "AssertionError (this is a bug"),
        ],
    )
    def test_one_line_and_the_code(self, error, code, line, capsys):
        assert report(error, debug=False) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"lading: error: {line}")
        assert err.count("\n") == 1

    def test_a_list_of_problems_is_shown_in_full(self, capsys):
        assert report(CardFileError(["a.yaml[0]: one", "a.yaml[1]: two\x1b"]), debug=False) == 3
        assert capsys.readouterr().err.splitlines() == [
            "lading: error: 2 problems:",
            "  a.yaml[0]: one",
            "  a.yaml[1]: two\\x1b",
            "Nothing was imported.",
        ]

    def test_interrupted(self, capsys):
        assert report(KeyboardInterrupt(), debug=False) == 130
        assert capsys.readouterr().err == "lading: interrupted\n"

    def test_nothing_is_printed_for_a_reader_that_left(self, capsys):
        assert report(BrokenPipeError(), debug=True) == 141
        assert capsys.readouterr() == ("", "")

    def test_debug_shows_the_traceback(self, capsys):
        with pytest.raises(CatalogError) as caught:
            raise CatalogError("damaged")
        assert report(caught.value, debug=True) == 6
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert lines[-1] == "lading: error: damaged"


class TestListingOptions:
    @pytest.fixture
    def command(self):
        @click.command()
        @output.listing_options
        def show(form: Form) -> None:
            click.echo(form.name)

        return show

    @pytest.mark.parametrize(
        ("option", "form"), [("", "TABLE"), ("--json", "JSON"), ("--nl", "LINES"), ("--csv", "CSV"), ("-q", "NAMES")]
    )
    def test_each(self, command, option, form):
        assert CliRunner().invoke(command, option.split()).output == f"{form}\n"

    def test_only_one(self, command):
        result = CliRunner().invoke(command, ["--json", "-q"])
        assert result.exit_code == 2
        assert "Only one of" in result.stderr
