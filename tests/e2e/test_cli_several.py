"""Commands on several models: by names, by patterns, and all that are here."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import save

import lading.checkpoints.locate
from lading.errors import CatalogError
from lading.sources.cache import Cache
from tests.helpers.make_checkpoint import make, tensors
from tests.servers.hostile import serve

Cli = Callable[..., Result]
Program = Callable[..., subprocess.CompletedProcess[str]]

COMMANDS = ("check", "index", "verify", "digests", "pull", "path", "show")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LADING_OFFLINE", "1")


@pytest.fixture
def fleet(cli: Cli, cards: Path) -> Path:
    """The cards ``fleet_a`` and ``fleet_b`` with checkpoints, and ``fleet_far`` without; the folder of checkpoints."""
    documents = []
    for name in ("a", "b"):
        make(cards.parent / "fleet" / name)
        documents.append(f"name: fleet_{name}\nbase: tiny\ncheckpoint: fleet/{name}\n")
    documents.append("name: fleet_far\nbase: tiny\ncheckpoint: hg://somebody/far\n")
    path = cards.with_name("fleet.yaml")
    path.write_text("---\n".join(documents))
    cli("import", path)
    return cards.parent / "fleet"


@pytest.mark.few(3)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_list_of_names_a_pattern_and_all(cli: Cli, fleet: Path, command: str) -> None:
    for words in (["fleet_a", "fleet_b"], ["fleet_[ab]"], ["fleet_a", "fleet_?", "fleet_b"], ["fleet_a@", "fleet_b@"]):
        result = cli(command, *words, "--json")
        values = json.loads(result.stdout)
        models = {value.get("model") or value.get("name") or Path(value["uri"]).name for value in values}
        assert {model.removesuffix("@")[-1] for model in models} == {"a", "b"}
        assert result.stderr == "lading: 2 models done\n"

    # `tiny_child` does not fit.
    result = cli(command, "--every", "--nl", code=4 if command == "check" else None)
    assert {"fleet_a", "fleet_b", "tiny"} <= {
        value.get("model") or value.get("name") or f"fleet_{Path(value['uri']).name}".replace("fleet_tiny", "tiny")
        for value in map(json.loads, result.stdout.splitlines())
    }
    assert " models " in result.stderr


@pytest.mark.few(3)
@pytest.mark.parametrize("command", COMMANDS)
def test_one_name_gives_one_object_and_a_pattern_a_list(cli: Cli, fleet: Path, command: str) -> None:
    one, listed = (json.loads(cli(command, name, "--json").stdout) for name in ("fleet_a", "fleet_a*"))
    assert isinstance(listed, list)
    assert isinstance(one, dict) == (command in ("check", "index", "show"))
    if isinstance(one, dict):
        assert [set(value) for value in listed] == [set(one)]


@pytest.mark.few(3)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_of_one_model_leaves_the_others(cli: Cli, fleet: Path, command: str) -> None:
    (fleet / "a" / "model.safetensors").write_bytes(b"damaged")
    failing = [] if command in ("path", "show") else ["fleet_a"]
    result = cli(command, "fleet_a", "nobody", "fleet_b", "--nl", code=4 if failing else 2)
    assert "fleet" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])
    errors = [line for line in result.stderr.splitlines() if line.startswith("lading: error: ")]
    assert len(errors) == 1 + len(failing)
    assert "'nobody'" in errors[0], "wrong names come before the work"
    assert "Traceback" not in result.stderr
    failed = ", ".join(["nobody", *failing])
    assert result.stderr.endswith(f"lading: {1 + len(failing)} of 3 models failed: {failed}\n")


def test_the_highest_exit_code_is_that_of_the_process(process: Program, cli: Cli, fleet: Path) -> None:
    (fleet / "b" / "model.safetensors").write_bytes(b"damaged")
    for words, code in (
        (("index", "fleet_a", "nobody"), 2),
        (("index", "nobody", "fleet_b", "fleet_a"), 4),
        (("index", "fleet_far", "fleet_b", "nobody"), 5),
        (("index", "tiny_gated", "fleet_far", "fleet_a"), 7),
        (("index", "fleet_a", "tiny"), 0),
        (("check", "tiny", "tiny_child"), 4),
        (("check", "fleet_a", "tiny_unknown"), 3),
        (("show", "fleet_*"), 0),
    ):
        done = process(*words)
        assert (done.returncode, words) == (code, words), done.stderr
        assert done.stderr.count("lading: error: ") == sum(map(words.__contains__, BAD)) - ("tiny_child" in words)


BAD = ("nobody", "fleet_b", "fleet_far", "tiny_gated", "tiny_child", "tiny_unknown")


def test_what_ends_the_command_is_not_repeated(cli: Cli, fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, code, said in (
        (KeyboardInterrupt(), 130, "lading: interrupted\n"),
        (CatalogError("the catalog is gone"), 6, "lading: error: the catalog is gone\n"),
        (BrokenPipeError(), 141, ""),
    ):
        asked: list[object] = []

        def fail(card: object, store: object, error: BaseException = error, asked: list[object] = asked) -> None:
            asked.append(card)
            raise error

        monkeypatch.setattr(lading.checkpoints.locate, "local_paths", fail)
        result = cli("path", "fleet_a", "fleet_b", code=code)
        assert (len(asked), result.stderr) == (1, said)


def test_a_bug_in_one_model_is_one_line(cli: Cli, fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = lading.checkpoints.locate.local_paths

    def fail(card, store):
        if card.name == "fleet_a":
            raise ZeroDivisionError
        return paths(card, store)

    monkeypatch.setattr(lading.checkpoints.locate, "local_paths", fail)
    result = cli("path", "fleet_a", "fleet_b", code=1)
    assert result.stdout == f"{fleet / 'b'}\n"
    assert result.stderr.startswith("lading: error: fleet_a: ZeroDivisionError (this is a bug in lading")


def test_patterns(cli: Cli, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "odd.yaml"
    odd.write_text("name: 'odd[ab]'\nbase: tiny\n---\nname: odda\nbase: tiny\n---\nname: größe\nbase: tiny\n")
    cli("import", odd)

    def names(*words: str | Path, code: int = 0) -> list[str]:
        return [json.loads(line)["name"] for line in cli("show", *words, "--nl", code=code).stdout.splitlines()]

    assert names("odd[ab]") == ["odd[ab]"], "the name of a card is not a pattern"
    assert names("odd[abc]") == ["odda"]
    assert names("gr*") == ["größe"]
    assert names("GR*", code=2) == []
    assert names("nobody*", "odda", code=2) == ["odda"]
    assert names("fleet_*") == ["fleet_a", "fleet_b", "fleet_far"]
    assert "No model named 'nobody*' is in the catalog" in cli("show", "nobody*", code=2).stderr

    # Commands on files take the models that are here, and say so if there are none.
    assert cli("path", "fleet_*").stdout.split() == [str(fleet / "a"), str(fleet / "b")]
    assert "No model that matches 'fleet_f*' is on this machine" in cli("verify", "fleet_f*", code=2).stderr

    # A path is not a pattern.
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "a[1]")
    make(tmp_path / "runs" / "a1")
    for path in ("runs/a[1]", "./runs/a[1]", tmp_path / "runs" / "a[1]"):
        assert json.loads(cli("check", path, "--json").stdout)["name"] == str(path)
    assert "the path does not exist" in cli("check", "./runs/b*", code=2).stderr


def test_wrong_words(cli: Cli, catalog: Path) -> None:
    for command in (*COMMANDS, "rm"):
        assert "--every" in cli(command, code=2).stderr
        assert "not both" in cli(command, "tiny", "--every", code=2).stderr
        assert cli(command, "--every").stderr == "lading: no model is on this machine.\n"
        assert cli(command, "nope", "no*", code=2).stdout == ""


def test_no_model_is_an_empty_list(cli: Cli, catalog: Path) -> None:
    for command in COMMANDS:
        assert cli(command, "--every", "--json").stdout == "[]\n"
        assert cli(command, "--every", "--nl").stdout == ""


def test_tables_of_several(cli: Cli, fleet: Path) -> None:
    lines = cli("check", "fleet_a", "tiny_child", code=4).stdout.splitlines()
    assert lines[0].split() == ["name", "fits", "family", "parameters", "size", "problems"]
    assert lines[1].split() == ["fleet_a", "yes", "qwen", "21.8K", "43.6", "kB"]
    assert lines[2].startswith("tiny_child  no ")
    assert "mis-shaped: " in lines[2]
    assert " more" in lines[2]

    lines = cli("index", "fleet_a", "fleet_b").stdout.splitlines()
    assert lines[0].split() == ["checkpoint", "format", "size", "parameters", "dtypes", "tensors"]
    assert lines[1].startswith(f"file://{fleet / 'a'}")

    shown = cli("show", "fleet_*").stdout
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("name ")] == [
        "fleet_a", "fleet_b", "fleet_far"
    ]  # fmt: skip
    shards = json.loads(cli("show", "fleet_a", "fleet_b", "--shards", "--json").stdout)
    assert [(s["name"], s["model"]) for s in shards] == [("model.safetensors", f"fleet_{m}") for m in "ab"]
    assert cli("show", "fleet_a", "fleet_b", "--csv").stdout.startswith("field,value,card,source,model\n")


# --- removal ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fetched(cli: Cli, cards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Returns which of ``got_a`` and ``got_b``, which lading fetched to its cache, are here."""
    monkeypatch.setenv("LADING_OFFLINE", "0")
    monkeypatch.setenv("LADING_CACHE_DIR", str(tmp_path / "cache"))
    with serve({f"/{name}.safetensors": save(tensors(), {"name": name}) for name in "ab"}) as server:
        path = tmp_path / "got.yaml"
        path.write_text(
            "---\n".join(f"name: got_{n}\nbase: tiny\ncheckpoint: {server.url(f'/{n}.safetensors')}\n" for n in "ab")
        )
        cli("import", path)
        assert cli("pull", "got_*", "--no-progress", "-q").stdout == "a.safetensors\nb.safetensors\n"

    return lambda: cli("list", "got_*", "--local", "-q").stdout.split()


@pytest.mark.few(2)
@pytest.mark.parametrize("words", [("got_a", "got_b"), ("--every",), ("got_a", "--orphans", "got_b"), ("got_[a]",)])
def test_several_are_listed_and_not_removed_without_yes(
    cli: Cli, fetched: Callable[[], list[str]], words: tuple[str, ...]
) -> None:
    done = cli("rm", *words, code=7)
    assert done.stdout == ""
    asked = ["got_a"] if words == ("got_[a]",) else ["got_a", "got_b"]
    assert [line.split()[1] for line in done.stderr.splitlines()[:-1]] == [f"{name}:" for name in asked]
    assert "Nothing was removed. Add `--yes`" in done.stderr
    assert fetched() == ["got_a", "got_b"]

    dry = cli("rm", *words, "--dry-run")
    assert dry.stdout.count("to be removed") >= len(asked)
    assert fetched() == ["got_a", "got_b"]

    done = cli("rm", *words, "--yes")
    assert [line.split(":")[0] for line in done.stdout.splitlines()][: len(asked)] == asked
    assert fetched() == [name for name in ("got_a", "got_b") if name not in asked]


@pytest.mark.slow
def test_a_removal_for_programs(cli: Cli, fetched: Callable[[], list[str]], tmp_path: Path) -> None:
    cli("index", "tiny")
    words = ("rm", "got_a", "tiny", "got_b", "tiny_gated")
    planned = json.loads(cli(*words, "--dry-run", "--json").stdout)
    assert [(row["name"], row["dry_run"]) for row in planned] == [("got_a", True), ("tiny", True), ("got_b", True)]
    assert fetched() == ["got_a", "got_b"]

    done = [json.loads(line) for line in cli(*words, "--yes", "--nl").stdout.splitlines()]
    assert [{**row, "dry_run": True} for row in done] == planned
    first, kept, _ = done
    (path,) = first["removed"]
    assert Path(path).is_relative_to(tmp_path / "cache")
    assert (first["bytes"] > 40_000, first["kept"], first["also_of"]) == (True, [], [])
    assert (kept["bytes"], kept["removed"], kept["also_of"]) == (0, [], ["tiny_child"])
    assert [set(file) for file in kept["kept"]] == [{"path", "reason"}]
    assert cli("rm", "got_a", "got_b", "--json").stdout == "[]\n"
    assert cli("rm", "--orphans", "-q").stdout == ""


def test_a_wrong_name_keeps_all(cli: Cli, fetched: Callable[[], list[str]]) -> None:
    done = cli("rm", "got_a", "nobody", "got_b", "--yes", code=2)
    assert "lading: nothing was removed." in done.stderr
    assert done.stdout == ""
    assert "1 of 1" not in done.stderr
    assert fetched() == ["got_a", "got_b"]


def test_one_name_is_removed_at_once(process: Program, fetched: Callable[[], list[str]]) -> None:
    assert process("rm", "got_a", "got_b").returncode == 7
    assert "1 file removed" in process("rm", "got_a").stdout
    assert fetched() == ["got_b"]


@pytest.mark.few(1)
@pytest.mark.parametrize(("answer", "code", "left"), [("n\n", 130, ["got_a", "got_b"]), ("y\n", 0, [])])
def test_on_a_terminal_it_asks(fetched: Callable[[], list[str]], answer: str, code: int, left: list[str]) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    words = [sys.executable, "-m", "lading", "rm", "got_a", "got_b"]
    done = subprocess.run(words, stdin=theirs, capture_output=True, text=True, check=False, timeout=60)
    os.close(ours)
    os.close(theirs)
    assert (done.returncode, fetched()) == (code, left), done.stderr
    assert "Remove 2 models?" in done.stderr
    assert "bug" not in done.stderr


def test_a_removal_that_fails_leaves_the_others(
    cli: Cli, fetched: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, failures = Cache.remove, [PermissionError(13, "Permission denied", "got_a.safetensors")]

    def fail(self: Cache, *args: Any, **options: Any) -> int:
        if failures:
            raise failures.pop()
        return remove(self, *args, **options)

    monkeypatch.setattr(Cache, "remove", fail)
    done = cli("rm", "got_*", "--yes", code=8)
    assert done.stderr.endswith("Permission denied: got_a.safetensors\nlading: 1 of 2 models failed: got_a\n")
    assert fetched() == ["got_a"]
    assert cli("rm", "got_a").stdout.startswith("got_a: 1 file removed")
