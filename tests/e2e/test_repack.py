"""Sidecars, from the command that makes one to the load that reads it, and whatever comes in between."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import lading
from fault_world import Place, World, open_world
from lading.errors import DigestMismatchError, NotSupportedError
from lading.families.qwen import get_qwen_model_hub
from lading.gangs import simulate_gangs
from lading.models.hub import load_with_report
from lading.models.report import LoadReport

Cli = Callable[..., Result]

DIM, INNER, LAYERS = 32, 1024, 2
CARD = f"""\
name: wide
model_family: qwen
checkpoint: {{uri}}
model_config: {{{{model_dim: {DIM}, max_seq_len: 64, vocab_size: 64, tied_embeddings: true, num_layers: {LAYERS},
  num_attn_heads: 4, num_key_value_heads: 4, head_dim: 8, qkv_proj_bias: false, q_norm: false, k_norm: false,
  ffn_inner_dim: {INNER}}}}}
"""
"""A model of wide inner layers: a third of its bytes is cut by columns."""


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random_(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    state = {"model.embed_tokens.weight": random_(64, DIM), "model.norm.weight": random_(DIM)}
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        state |= {f"{layer}.{name}_layernorm.weight": random_(DIM) for name in ("input", "post_attention")}
        state |= {f"{layer}.self_attn.{name}_proj.weight": random_(DIM, DIM) for name in "qkvo"}
        state |= {f"{layer}.mlp.{name}_proj.weight": random_(INNER, DIM) for name in ("gate", "up")}
        state[f"{layer}.mlp.down_proj.weight"] = random_(DIM, INNER)
    return state


BYTES = sum(tensor.nbytes for tensor in weights().values())
BY_COLUMNS = sum(tensor.nbytes for name, tensor in weights().items() if "down_proj" in name or "o_proj" in name)


def save(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(weights(seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def wide(catalog: Path, tmp_path: Path) -> Path:
    """The folder of a checkpoint, of which there is a card."""
    folder = save(tmp_path / "wide")
    (tmp_path / "cards.yaml").write_text(CARD.format(uri=folder))
    lading.import_cards(tmp_path / "cards.yaml")
    return folder


def load(rank: int = 0, verify: str = "auto", mmap: bool = False, seed: int = 0, **sizes: int) -> LoadReport:
    """Load what a rank owns, and make sure that it is that.

    :param seed: of the weights.
    """
    with simulate_gangs(rank, **sizes) as gangs:
        model, report = load_with_report("wide", gangs=gangs, dtype="auto", progress=False, verify=verify, mmap=mmap)
        rows, columns = (gangs.sdp.size, gangs.sdp.rank), (gangs.tp.size, gangs.tp.rank)
    expected = weights(seed)
    for name, parameter in model.named_parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        want = expected[name]
        if "norm" not in name:
            want = want.chunk(columns[0], 1 if "o_proj" in name or "down_proj" in name else 0)[columns[1]]
        assert torch.equal(own.detach(), want.chunk(rows[0])[rows[1]]), name
    return report


def repacked(home: Path) -> list[Path]:
    return sorted((home / "cache" / "lading" / "repacked").glob("*"))


def rows(catalog: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(catalog)) as connection:
        return connection.execute(sql).fetchall()


def rot(path: Path, tensor: str, catalog: Path) -> None:
    """Flip a bit as a bad disk does, which tells nobody: the catalog knows the file in the state that it has then."""
    manifest = lading.formats.index(path)
    data = bytearray(path.read_bytes())
    data[manifest.offsets[list(manifest.names).index(tensor)]] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)
    stat = path.stat()
    with closing(sqlite3.connect(catalog)) as connection, connection:
        state = (stat.st_mtime_ns, stat.st_ctime_ns, str(path))
        connection.execute("UPDATE copies SET mtime_ns = ?, ctime_ns = ? WHERE path = ?", state)


# --- made, and read --------------------------------------------------------------------------------------------------


def test_a_rank_reads_what_it_keeps(wide: Path, home: Path) -> None:
    before = [load(rank, tp=4) for rank in range(4)]
    report = lading.repack_model("wide", tp=4, progress=False)
    after = [load(rank, tp=4) for rank in range(4)]

    assert all(r.bytes_read > 0.45 * BYTES for r in before)
    assert all(r.bytes_read <= 0.265 * BYTES for r in after)
    assert all(a.reads <= b.reads for a, b in zip(after, before, strict=True))
    assert (report.written, report.tensors, report.bytes, report.checkpoint_bytes) == (True, 4, BY_COLUMNS, BYTES)
    assert report.share == BY_COLUMNS / BYTES
    assert repacked(home) == [report.path]
    assert report.path.stat().st_mode & 0o777 == 0o444


def test_other_gangs_read_the_checkpoint(wide: Path) -> None:
    before = load(1, tp=2).bytes_read
    lading.repack_model("wide", tp=4, progress=False)

    assert load(1, tp=2).bytes_read == before
    assert load(0).bytes_read == BYTES


def test_rows_are_cut_as_well_and_mapped(wide: Path) -> None:
    lading.repack_model("wide", tp=2, progress=False)

    assert load(3, tp=2, sdp=2).bytes_read <= 0.265 * BYTES
    report = load(1, tp=2, mmap=True)
    assert report.bytes_read == 0
    assert report.bytes_mapped > 0.5 * BYTES


def parts(folder: Path, rank: int, **sizes: int) -> dict[str, torch.Tensor]:
    """What a rank owns, tensor by tensor."""
    hub = get_qwen_model_hub()
    with simulate_gangs(rank, **sizes) as gangs:
        return dict(hub.iter_checkpoint(folder, hub.get_model_config("wide"), gangs=gangs))


def test_tensors_one_by_one(wide: Path, catalog: Path) -> None:
    lading.repack_model("wide", tp=2, progress=False)
    name = "model.layers.1.mlp.down_proj.weight"
    # The place of a tensor that a sidecar stands for is not read: nobody sees that it is damaged.
    rot(wide / "model.safetensors", name, catalog)
    expected = weights()

    for rank in range(2):
        found = parts(wide, rank, tp=2)
        assert found.keys() == expected.keys()
        assert torch.equal(found[name], expected[name].chunk(2, 1)[rank])
    for rank in range(4):
        found = parts(wide, rank, tp=2, sdp=2)
        assert torch.equal(found[name], expected[name].chunk(2, 1)[rank % 2].chunk(2)[rank // 2])
    assert not torch.equal(parts(wide, 0, tp=4)[name], expected[name].chunk(4, 1)[0])
    assert not torch.equal(parts(wide, 0)[name], expected[name])


@pytest.mark.parametrize("change", ["sidecar", "checkpoint", "catalog"])
def test_tensors_of_what_is_not_as_it_was(wide: Path, home: Path, catalog: Path, change: str) -> None:
    """The sidecar is left aside, and what the files hold is read."""
    lading.repack_model("wide", tp=2, progress=False)
    if change == "sidecar":
        (path,) = repacked(home)
        path.chmod(0o644)
        path.write_bytes(b"nothing")
    elif change == "checkpoint":
        save(wide, seed=1)
    else:
        with closing(sqlite3.connect(catalog)) as connection, connection:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("DELETE FROM checkpoints WHERE uri NOT LIKE 'repack%'")
    expected = weights(1 if change == "checkpoint" else 0)

    for rank in range(2):
        for name, tensor in parts(wide, rank, tp=2).items():
            split = "norm" not in name
            dim = 1 if "o_proj" in name or "down_proj" in name else 0
            assert torch.equal(tensor, expected[name].chunk(2, dim)[rank] if split else expected[name]), name


def test_what_is_in_it(wide: Path) -> None:
    path = lading.repack_model("wide", tp=2, progress=False).path

    found, expected = load_file(path), weights()
    names = [n for n in expected if "o_proj" in n or "down_proj" in n]
    assert set(found) == {f"{name}.{k}" for name in names for k in range(2)}
    for name in names:
        assert torch.equal(torch.cat([found[f"{name}.0"], found[f"{name}.1"]], 1), expected[name])
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["lading.checkpoints.checkpoint"] == wide.as_uri()
    assert metadata["lading.tp"] == "2"


def test_it_is_made_once(wide: Path, home: Path) -> None:
    first = lading.repack_model("wide", tp=2, progress=False)
    state = first.path.stat()
    second = lading.repack_model("wide", tp=2, progress=False)

    assert (first.written, second.written) == (True, False)
    assert second.path == first.path
    assert first.path.stat() == state
    lading.repack_model("wide", tp=4, progress=False)
    assert len(repacked(home)) == 2


def test_what_was_fetched_by_its_sha256(
    catalog: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from servers.hostile import serve

    monkeypatch.setenv("LADING_OFFLINE", "")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    file = save(tmp_path / "origin") / "model.safetensors"
    with serve({"/model.safetensors": file.read_bytes()}, digests=True) as server:
        (tmp_path / "cards.yaml").write_text(CARD.format(uri=server.url("/model.safetensors")))
        lading.import_cards(tmp_path / "cards.yaml")
        lading.repack_model("wide", tp=4, progress=False)
        assert load(3, tp=4, verify="always").bytes_read <= 0.265 * BYTES

        both = file.stat().st_size + sum(path.stat().st_size for path in repacked(home))
        assert lading.remove_model("wide").freed == both
        assert repacked(home) == []
        assert not list((home / "cache" / "lading" / "blobs").rglob("*.safetensors"))


def test_a_plan_tells_of_it(wide: Path) -> None:
    without = lading.plan_load("wide", tp=4)
    path = lading.repack_model("wide", tp=4, progress=False).path
    told = lading.plan_load("wide", tp=4)

    assert (without.sidecar, told.sidecar) == (None, path)
    assert told.checkpoint_bytes == BYTES
    for rank, before in zip(told.ranks, without.ranks, strict=True):
        report = load(rank.rank, tp=4)
        assert (rank.bytes_read, rank.reads, rank.files) == (report.bytes_read, report.reads, 2)
        assert rank.memory == before.memory
    assert lading.plan_load("wide", tp=2).sidecar is None
    assert lading.plan_load("wide").sidecar is None

    from lading.operations.plan_svg import picture

    drawn = picture(told)
    assert path.name in drawn


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_a_bit_that_flipped(wide: Path, catalog: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = lading.repack_model("wide", tp=4, progress=False).path
    rot(path, "model.layers.1.mlp.down_proj.weight.0", catalog)

    assert load(3, tp=4, verify="always").bytes_read <= 0.265 * BYTES  # of another block
    with pytest.raises(DigestMismatchError, match=r"`lading repack wide --tp 4` makes the file anew") as caught:
        load(0, tp=4, verify="always")
    assert str(path) in str(caught.value)
    (last,) = rows(catalog, "SELECT uri, result FROM verifications ORDER BY id DESC LIMIT 1")
    assert last == (f"repack+tp=4:{wide.as_uri()}", "mismatch")

    # From then on it is known.
    with caplog.at_level(logging.WARNING, "lading"):
        assert load(0, tp=4, verify="always").bytes_read > 0.3 * BYTES
    assert "the sidecar of wide for tp=4 is left aside" in caplog.text
    assert lading.repack_model("wide", tp=4, progress=False).written
    assert load(0, tp=4, verify="always").bytes_read <= 0.265 * BYTES


def test_it_is_verified_with_its_checkpoint(wide: Path, catalog: Path, cli: Cli) -> None:
    path = lading.repack_model("wide", tp=4, progress=False).path
    assert cli("verify", "wide", "-q").stdout.splitlines() == ["model.safetensors", path.name]

    os.utime(path)
    assert [row["result"] for row in json.loads(cli("verify", "wide", "--json").stdout)] == ["match", "match"]
    assert load(1, tp=4).bytes_read <= 0.265 * BYTES

    rot(path, "model.layers.1.mlp.down_proj.weight.0", catalog)
    found = cli("verify", "wide", "--json", code=4)
    assert [row["result"] for row in json.loads(found.stdout)] == ["match", "mismatch"]
    assert f"`lading repack wide --tp 4` makes the file {path.name} anew" in found.stderr
    assert load(1, tp=4).bytes_read > 0.3 * BYTES

    path.unlink()
    assert [row["method"] for row in json.loads(cli("verify", "wide", "--json", code=4).stdout)][1] == "presence"


@pytest.mark.parametrize("what", ["touched", "gone"])
def test_a_file_that_is_not_as_it_was(wide: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    path = lading.repack_model("wide", tp=4, progress=False).path
    if what == "gone":
        path.unlink()
    else:
        os.utime(path)

    with caplog.at_level(logging.WARNING, "lading"):
        assert load(1, tp=4).bytes_read > 0.3 * BYTES
    assert f"{path} is {'gone' if what == 'gone' else 'not as it was'}" in caplog.text
    assert "`lading repack wide --tp 4` makes it anew" in caplog.text
    assert lading.repack_model("wide", tp=4, progress=False).written
    assert load(1, tp=4).bytes_read <= 0.265 * BYTES


def test_a_checkpoint_that_was_replaced(wide: Path, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = lading.repack_model("wide", tp=4, progress=False).path
    save(wide, seed=1)

    lading.index_checkpoint("wide")
    assert load(1, verify="never", seed=1, tp=4).bytes_read > 0.3 * BYTES
    assert load(1, seed=1, tp=4).bytes_read > 0.3 * BYTES
    lading.verify_model("wide", progress=False)
    with caplog.at_level(logging.WARNING, "lading"):
        assert load(1, seed=1, tp=4).bytes_read > 0.3 * BYTES
    assert "not known to be of the weights that the checkpoint has now" in caplog.text

    new = lading.repack_model("wide", tp=4, progress=False).path
    assert repacked(home) == [new] != [old]
    assert load(1, verify="always", seed=1, tp=4).bytes_read <= 0.265 * BYTES


def test_a_checkpoint_that_was_replaced_by_mistake(wide: Path) -> None:
    lading.repack_model("wide", tp=4, progress=False)
    save(wide, seed=1)

    # Who wants to see it all the same gets nothing of what it was.
    assert load(1, verify="never", seed=1, tp=4).bytes_read > 0.3 * BYTES
    for verify in ("auto", "always"):
        with pytest.raises(DigestMismatchError, match="are not those that were verified before"):
            load(1, verify=verify, tp=4)
    with pytest.raises(DigestMismatchError, match="Nothing was made of it"):
        lading.repack_model("wide", tp=2, progress=False)


def test_the_same_bytes_saved_again(wide: Path) -> None:
    lading.repack_model("wide", tp=4, progress=False)
    save(wide)

    assert load(0, tp=4).bytes_read > 0.3 * BYTES  # which verifies it
    assert load(0, tp=4).bytes_read <= 0.265 * BYTES
    assert not lading.repack_model("wide", tp=4, progress=False).written


def test_a_checkpoint_that_went_bad_is_not_made_good(wide: Path, catalog: Path, home: Path) -> None:
    lading.verify_model("wide", progress=False)
    rot(wide / "model.safetensors", "model.layers.0.self_attn.o_proj.weight", catalog)

    with pytest.raises(DigestMismatchError, match=r"o_proj.weight is not the tensor that was verified before"):
        lading.repack_model("wide", tp=4, progress=False)
    assert repacked(home) == []
    assert rows(catalog, "SELECT count(*) FROM checkpoints WHERE uri LIKE 'repack%'") == [(0,)]


def test_what_cannot_be_cut(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`tp` must be at least 2, but is 1"):
        lading.repack_model("wide", tp=1)
    with pytest.raises(NotSupportedError, match="`num_attn_heads` is 4"):
        lading.repack_model("wide", tp=3)
    gpt2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_embd": 8, "n_head": 2}
    save(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(gpt2))
    (tmp_path / "more.yaml").write_text("name: planless\nmodel_family: hg\nmodel_arch: causal_lm\ncheckpoint: ./gpt2\n")
    lading.import_cards(tmp_path / "more.yaml")
    with pytest.raises(NotSupportedError, match="hg family have no plan for tensor parallelism"):
        lading.repack_model("planless", tp=2, progress=False)


# --- counted, and removed --------------------------------------------------------------------------------------------


def test_it_is_counted_and_removed(wide: Path, cli: Cli, home: Path) -> None:
    path = lading.repack_model("wide", tp=4, progress=False).path
    usage = {(row["kind"], row["bytes"]): row for row in json.loads(cli("du", "wide", "--json").stdout)}
    (sidecar,) = [row for (kind, _), row in usage.items() if kind == "cache"]
    assert (sidecar["name"], sidecar["bytes"], sidecar["path"]) == ("wide", path.stat().st_size, str(path))
    assert (sidecar["complete"], sidecar["verified"]) == (True, True)
    assert "nothing of orphans" in cli("rm", "--orphans").output
    assert path.exists()

    dry = lading.remove_model("wide", dry_run=True)
    assert path in dry.removed
    assert dry.freed == path.stat().st_size
    assert path.exists()
    done = cli("rm", "wide")
    assert "the card's own file" in done.stderr
    assert "1 file removed" in done.stdout
    assert repacked(home) == []
    assert (wide / "model.safetensors").exists()
    assert load(1, tp=4).bytes_read > 0.3 * BYTES


def test_one_of_no_card_is_an_orphan(wide: Path, cli: Cli, tmp_path: Path, home: Path) -> None:
    path = lading.repack_model("wide", tp=4, progress=False).path
    (tmp_path / "cards.yaml").write_text(CARD.format(uri=tmp_path / "elsewhere"))
    lading.import_cards(tmp_path / "cards.yaml", replace=True)

    assert [Path(h.path) for h in lading.disk_usage().orphans] == [path]
    assert lading.remove_orphans().removed == ()  # it is too young
    removal = lading.remove_orphans(older_than=-1)
    assert removal.removed == (path,)
    assert repacked(home) == []


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command(wide: Path, cli: Cli) -> None:
    done = cli("repack", "wide", "--tp", "4", "--no-progress")
    (path,) = [word for word in done.stdout.split() if word.endswith(".safetensors")]
    assert done.stdout == f"wide: 4 tensors cut for tp=4, {BY_COLUMNS / 1e3:.0f} kB (33% of the checkpoint) in {path}\n"
    assert "already cut for tp=4" in cli("repack", "wide", "--tp", "4").stdout
    report = json.loads(cli("repack", "wide", "--tp", "2", "--json").stdout)
    assert (report["name"], report["tp"], report["tensors"], report["written"]) == ("wide", 2, 4, True)
    assert "in 1 file and a sidecar;" in cli("plan", "wide", "--tp", "4").stderr

    assert "1 is not in the range 2<=x" in cli("repack", "wide", "--tp", "1", code=2).stderr
    assert "`num_attn_heads` is 4" in cli("repack", "wide", "--tp", "3", code=2).stderr
    assert "Did you mean 'wide'" in cli("repack", "wyde", "--tp", "2", code=2).stderr


# --- broken off ------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full(wide: Path, home: Path) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    code += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += "import sys; from lading.cli import main; sys.argv = ['lading', 'repack', 'wide', '--tp', '4']; main()"
    lading.verify_model("wide", progress=False)
    before = lading.disk_usage()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 8, done.stderr
    assert "Traceback" not in done.stderr
    assert repacked(home) == []
    assert not [p for p in (home / "cache" / "lading" / "tmp").glob("*") if p.is_file()]
    assert lading.disk_usage() == before


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_a_command_that_is_killed(world: World, tmp_path: Path, count: int) -> None:
    shutil.copy(world.template, tmp_path / "catalog.sqlite")
    place = Place(tmp_path, world.nursery)
    command = ["repack", "near", "--tp", "2", "--no-progress"]
    place.run("verify", "near")
    place.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    prepared = shutil.copy(place.catalog, tmp_path / "prepared")

    def renew() -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        for path in tmp_path.glob("catalog.sqlite-*"):
            path.unlink()
        shutil.copy(prepared, place.catalog)

    place.run(*command, counted=str(tmp_path / "count"))
    calls = (tmp_path / "count").stat().st_size
    rng = random.Random(count)
    base = "SELECT * FROM {} WHERE checkpoint_id = (SELECT id FROM checkpoints WHERE uri NOT LIKE 'repack%')"
    for _ in range(count):
        renew()
        known = [place.sql(base.format(table)) for table in ("tensors", "digests", "copies")]
        ended = world.nursery.run(command, place.env, killed_at=rng.randint(1, calls))
        assert ended.code == -9, ended

        # What was known is known, and a plan takes no half of a sidecar.
        assert [place.sql(base.format(table)) for table in ("tensors", "digests", "copies")] == known
        told = place.run("plan", "near", "--tp", "2")
        done = place.run(*command).out
        if "a sidecar" in told.err:
            assert "already cut" in done
        assert "a sidecar" in place.run("plan", "near", "--tp", "2").err
        assert [path for path in (place.cache / "tmp").rglob("*") if path.is_file()] == []
        assert len(list((place.cache / "repacked").iterdir())) == 1
