"""`lading adopt`, `du` and `rm`, and what a hub has to do with them."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

from tests.helpers.cached_repository import CONFIG, add_cards, add_snapshot, tree, use_cache
from tests.helpers.make_checkpoint import make
from tests.servers.hub import FakeHub

Cli = Callable[..., Result]
Run = Callable[..., subprocess.CompletedProcess[str]]

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


# --- beside a hub ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.add("Some/Tiny", make(tmp_path / "repository", shards=2))
        yield hub


@pytest.fixture
def env(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "LADING_OFFLINE": "",
    }


@pytest.fixture
def run(process: Run, env: dict[str, str], tmp_path: Path) -> Run:
    cards = tmp_path / "cards.yaml"
    cards.write_text(f"name: far\ncheckpoint: hg://some/tiny\n{CONFIG}")

    def run(*words: str | Path, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        done = process(*words, env=env | more)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    run("import", cards)
    return run


def download(run: Run, *names: str) -> None:
    """As another program would: with huggingface_hub itself."""
    code = "import huggingface_hub, sys; [huggingface_hub.hf_hub_download('Some/Tiny', name) for name in sys.argv[1:]]"
    run("-c", code, *names)


def kinds(run: Run) -> dict[str, str]:
    rows = json.loads(run("sql", "select file, kind from copies", "--json").stdout)
    return {row["file"]: row["kind"] for row in rows}


@pytest.mark.slow
def test_the_hub_s_cache_has_no_owners(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    download(run, "config.json", SHARDS[0])

    run("load", "far", "--no-progress")
    assert {Path(file).name: kind for file, kind in kinds(run).items()} == dict.fromkeys(
        (*SHARDS, "config.json"), "hub"
    )

    (snapshot,) = tmp_path.glob("hub/models--Some--Tiny/snapshots/*")
    before = {path.name for path in snapshot.iterdir()}
    done = run("rm", "far", code=7)
    assert f"{snapshot.name} of Some/Tiny" in done.stderr
    assert "`lading rm far --yes`" in done.stderr
    assert {path.name for path in snapshot.iterdir()} == before

    assert f"{snapshot.name} of Some/Tiny was deleted" in run("rm", "far", "--yes").stderr
    assert not snapshot.exists()


def test_a_model_of_the_hub_is_removed_and_fetched_again(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    run("pull", "far")
    assert set(kinds(run).values()) == {"hub"}
    (row,) = json.loads(run("du", "--json").stdout)
    files = list((tmp_path / "repository").iterdir())
    size = sum(path.stat().st_size for path in files)
    assert (row["name"], row["kind"], row["files"], row["bytes"]) == ("far", "hub", len(files), size)
    assert row["verified"]
    run("adopt")
    assert set(kinds(run).values()) == {"hub"}, "what the catalog knows already stays what it is"

    assert "(dry run)" in run("rm", "far", "--dry-run").stdout
    assert "4 files removed" in run("rm", "far", "--yes").stdout
    assert "nothing of far is on this machine" in run("rm", "far").stderr
    assert json.loads(run("du", "--json").stdout) == []
    assert list((tmp_path / "hub").glob("models--*")) == []

    run("load", "far", "--no-progress")


@pytest.mark.slow
def test_nothing_is_removed_where_one_of_several_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "near.yaml").write_text(f"name: near\ncheckpoint: {tmp_path / 'repository'}\n{CONFIG}")
    run("import", tmp_path / "near.yaml")
    run("load", "near", "--no-progress")
    run("pull", "far")
    before = kinds(run)

    done = run("rm", "near", "far", code=7)
    assert "lading: far: 4 files, " in done.stderr
    assert "Add `--yes`" in done.stderr
    assert done.stdout == ""
    assert kinds(run) == before


@pytest.mark.slow
def test_a_revision_that_a_pull_left_goes_with_the_rest(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    download(run, "config.json")
    run("pull", "far")
    repository = hub.repositories["some/tiny"]
    files = {path.name: path.read_bytes() for path in (tmp_path / "repository").iterdir()}
    first = files[SHARDS[0]]
    commit = repository.commit(files | {SHARDS[0]: first[:-1] + bytes([first[-1] ^ 1])})
    run("pull", "far")
    (old,) = set(repository.commits) - {commit}

    (row,) = json.loads(run("du", "--json").stdout)
    # What is the same in both is there once.
    assert row["bytes"] == sum(map(len, files.values())) + len(first)
    assert (row["files"], row["complete"], row["verified"]) == (8, True, True)

    done = run("rm", "far", "--yes")
    assert f"{old} of Some/Tiny was deleted" in done.stderr
    assert list((tmp_path / "hub").glob("models--*")) == []


@pytest.mark.slow
def test_what_came_along_stays_while_another_card_has_it(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(f"name: other\ncheckpoint: hf://Some/Tiny\n{CONFIG}")
    run("import", tmp_path / "other.yaml")
    run("pull", "far")
    run("pull", "other")

    assert "0 files removed" in run("rm", "far").stdout
    (snapshot,) = tmp_path.glob("hub/models--*/snapshots/*")
    assert {path.name for path in snapshot.iterdir()} == {"config.json", "model.safetensors.index.json", *SHARDS}
    assert "4 files removed" in run("rm", "other", "--yes").stdout
    assert not snapshot.exists()


@pytest.mark.slow
def test_what_a_failed_pull_brought_is_removed_with_the_rest(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.misbehave(SHARDS[1], "404")
    run("pull", "far", code=2)
    hub.behave()
    run("pull", "far")

    assert set(kinds(run).values()) == {"hub"}
    assert "4 files removed" in run("rm", "far", "--yes").stdout
    assert list((tmp_path / "hub").glob("models--*")) == []


@pytest.mark.slow
def test_adopting_sends_no_request(run: Run, hub: FakeHub) -> None:
    download(run, "config.json", "model.safetensors.index.json", *SHARDS)
    hub.requests.clear()

    assert "1 checkpoint adopted" in run("adopt").stderr
    run("load", "far", "--no-progress", "--dtype", "auto")

    assert hub.requests == []


# --- what they write -------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LADING_OFFLINE", "1")
    return use_cache(tmp_path / "hub", monkeypatch)


@pytest.fixture
def models(tmp_path: Path, cache: Path, catalog: Path) -> Path:
    """A folder with a good checkpoint, one that may be of a card, and a broken one; a card of one in the cache."""
    models = tmp_path / "models"
    make(models / "Tiny")
    shutil.copytree(models / "Tiny", models / "other")
    (models / "broken").mkdir()
    (models / "broken" / "model.safetensors").write_bytes(b"nothing")
    add_cards(tmp_path, tiny="hg://Qwen/Tiny")
    return models


def test_what_adopt_writes(cli: Cli, cache: Path, models: Path) -> None:
    add_snapshot(cache, "Qwen/Tiny", models / "Tiny")

    dry = cli("adopt", "--dry-run")
    assert "1 checkpoint adopted (dry run: nothing was written)" in dry.stderr
    assert cli("du").stdout == ""
    result = cli("adopt")
    assert "adopted  checkpoint  tiny " in result.stdout
    assert "known   checkpoint  tiny " in cli("adopt").stdout

    result = cli("adopt", models)
    assert "2 checkpoints adopted, 1 checkpoint that cannot be used" in result.stderr
    assert f"name: tiny@user\n  checkpoint: {models / 'Tiny'}" in result.stderr
    assert f"{models / 'broken' / 'model.safetensors'}" in result.stderr
    assert cli("adopt", models, "-q").stdout.splitlines() == [str(models / n) for n in ("Tiny", "broken", "other")]
    rows = json.loads(cli("adopt", models, "--json").stdout)
    assert [(row["status"], row["cards"], bool(row["problem"])) for row in rows] == [
        ("known", [], False), ("failed", [], True), ("known", [], False),
    ]  # fmt: skip
    assert rows[0]["overlays"] == [f"name: tiny@user\ncheckpoint: {models / 'Tiny'}\n"]
    assert len(cli("adopt", models, "--nl").stdout.splitlines()) == 3
    assert next(csv.DictReader(io.StringIO(cli("adopt", models, "--csv").stdout)))["path"] == str(models / "Tiny")


def test_the_exit_code_is_of_what_failed_if_all_did(cli: Cli, models: Path, tmp_path: Path) -> None:
    cli("adopt", models / "broken", code=4)
    (models / "linked").mkdir()
    (models / "linked" / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    cli("adopt", models / "broken", models / "Tiny")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "other.safetensors").write_bytes(b"x")
    cli("adopt", tmp_path / "only", code=2)
    assert "no checkpoint was found" in cli("adopt", tmp_path / "hub").stderr
    cli("adopt", tmp_path / "nowhere", code=2)
    cli("adopt", models / "Tiny" / "model.safetensors", code=2)


def test_what_du_and_rm_write(cli: Cli, cache: Path, models: Path) -> None:
    cli("adopt", models)
    cli("adopt")
    before = tree(models)

    shown = cli("du").stdout.splitlines()
    assert shown[0].split() == ["name", "size", "kind", "files", "verified", "path"]
    assert shown[-1].split()[0] == "total"
    assert len(shown) == 4
    other = str(models / "other")
    assert cli("du", "*other", "-q").stdout.splitlines() == [other]
    assert cli("du", "tiny").stderr.startswith("lading: nothing is on this machine")
    assert "Did you mean 'tiny'" in cli("du", "tinny", code=2).stderr
    cli("du", "--orphans", "tiny", code=2)
    assert "no orphans were found" in cli("du", "--orphans").stderr

    assert "stays: adopted, not fetched by lading" in cli("rm", other).stderr
    assert cli("du", "*other", "--json").stdout == "[]\n"
    assert "nothing of tiny is on this machine" in cli("rm", "tiny").stderr
    assert "no orphans were found" in cli("rm", "--orphans").stderr
    cli("rm", code=2)
    assert "Did you mean 'tiny'" in cli("rm", "tiny", "tinny", code=2).stderr
    assert tree(models) == before
