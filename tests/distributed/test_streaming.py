"""Ranks that read straight from a web server: the same models, each only its own bytes, and none waits in vain."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import lading
from lading.gangs import create_gangs, world
from lading.models.hub import load_with_report
from lading.transfer import cooperative
from tests.distributed.gang_tools import check_gang_errors, raised_by
from tests.distributed.workers import Pool
from tests.servers.hostile import Exchange, Server, honest, serve

CARD = """\
name: far
model_family: qwen
checkpoint: {uri}
model_config: {{model_dim: 512, max_seq_len: 128, vocab_size: 4000, tied_embeddings: true, num_layers: 1,
  num_attn_heads: 8, num_key_value_heads: 4, head_dim: 64, qkv_proj_bias: false, q_norm: true, k_norm: true,
  ffn_inner_dim: 1024}}
"""


def make(path: Path) -> bytes:
    """A checkpoint of 18 MB, large enough that parts of matrices are far from one another."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    layer = "model.layers.0"
    tensors = {
        "model.embed_tokens.weight": random(4000, 512),
        "model.norm.weight": random(512),
        f"{layer}.input_layernorm.weight": random(512),
        f"{layer}.post_attention_layernorm.weight": random(512),
        f"{layer}.self_attn.q_proj.weight": random(512, 512),
        f"{layer}.self_attn.k_proj.weight": random(256, 512),
        f"{layer}.self_attn.v_proj.weight": random(256, 512),
        f"{layer}.self_attn.o_proj.weight": random(512, 512),
        f"{layer}.self_attn.q_norm.weight": random(64),
        f"{layer}.self_attn.k_norm.weight": random(64),
        f"{layer}.mlp.gate_proj.weight": random(1024, 512),
        f"{layer}.mlp.up_proj.weight": random(1024, 512),
        f"{layer}.mlp.down_proj.weight": random(512, 1024),
    }
    save_file(tensors, path, {"format": "pt"})
    return path.read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make(tmp_path_factory.mktemp("far") / "model.safetensors")


@pytest.fixture
def server(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve({"/m/model.safetensors": data}) as server:
        (tmp_path / "far.yaml").write_text(CARD.format(uri=server.url("/m/model.safetensors")))
        for name, value in environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        lading.index_checkpoint("far")
        server.requests.clear()
        yield server


def environment(home: Path) -> dict[str, str]:
    return {
        "LADING_DATABASE_URL": f"sqlite:///{home}/c.sqlite",
        "LADING_CARDS": str(home / "far.yaml"),
        "LADING_CACHE_DIR": str(home / "cache"),
        "XDG_CONFIG_HOME": str(home),
        "LADING_OFFLINE": "",
        "NO_PROXY": "127.0.0.1",
    }


def sent(server: Server) -> int:
    """The bytes that the server was asked for by GET."""
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", "")) for headers in server.gets()]
    assert all(ranges)
    return sum(int(found[2]) - int(found[1]) + 1 for found in ranges if found is not None)


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


@contextmanager
def short_steps() -> Iterator[None]:
    """Have ranks divide some megabytes as evenly as they divide gigabytes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LEAF", 64 << 10), ("ROUND", 1 << 20)):
            patch.setattr(cooperative, name, value)
        yield


# --- what each rank reads ---------------------------------------------------------------------------------------------


def streamed(
    home: str, local_file: str, sizes: dict[str, int], dtype: str, together: bool, verify: str
) -> tuple[list[str], int, bool | None]:
    """What differs from a load of a file; the bytes that this rank has streamed; whether they were verified."""
    os.environ |= environment(Path(home))
    with create_gangs("cpu", **sizes) as gangs, short_steps():  # type: ignore[arg-type]
        options: dict[str, Any] = {"gangs": gangs, "dtype": dtype, "progress": False, "cooperative": together}
        model, report = load_with_report("far", **options, stream=True, verify=verify)  # type: ignore[arg-type]
        config = lading.families.qwen.get_qwen_model_hub().get_model_config("far")
        expected = lading.families.qwen.get_qwen_model_hub().load_custom_model(Path(local_file), config, **options)
    found = dict(model.named_parameters())
    different = [name for name, p in expected.named_parameters() if not torch.equal(local(p), local(found[name]))]

    return different, report.bytes_read, report.verified


@pytest.mark.parametrize(
    ("sizes", "dtype", "together", "share", "total"),
    [
        ({"sdp": 4}, "auto", False, 0.26, 1.03),
        ({"tp": 4}, "auto", False, 0.45, 1.8),
        ({"tp": 4}, "bfloat16", True, 0.27, 1.02),
        pytest.param({"pp": 1}, "auto", True, 0.27, 1.02, marks=pytest.mark.slow),
        pytest.param({"sdp": 4}, "bfloat16", False, 0.26, 1.03, marks=pytest.mark.slow),
        pytest.param({"sdp": 4}, "auto", True, 0.27, 1.02, marks=pytest.mark.slow),
        pytest.param({"tp": 4}, "bfloat16", False, 0.45, 1.8, marks=pytest.mark.slow),
        pytest.param({"tp": 2, "sdp": 2}, "float64", False, 0.33, 1.3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_rank_streams_its_own_bytes(
    pool4: Pool, server: Server, tmp_path: Path, data: bytes,
    sizes: dict[str, int], dtype: str, together: bool, share: float, total: float,
) -> None:  # fmt: skip
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    found = pool4.values(streamed, str(tmp_path), str(file), sizes, dtype, together, "never")
    assert [different for different, _, _ in found] == [[]] * 4
    assert max(read for _, read, _ in found) <= share * len(data)
    # The validators say that the header is still the one that was indexed: nothing but weights is sent.
    assert sent(server) == sum(read for _, read, _ in found) <= total * len(data)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.stat().st_size > 1 << 20]


def damaged(exchange: Exchange) -> None:
    """Other weights under the validator of before."""
    data, wanted = exchange.data or b"", exchange.wanted()
    if exchange.command == "HEAD" or wanted is None or wanted[0] == 0:
        honest(exchange)
        return
    start, end = wanted
    body = bytes([data[start] ^ 4]) + data[start + 1 : end]
    exchange.answer(206, {**exchange.about(), "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, body)


def test_slices_are_verified_by_blocks(server: Server, tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with Pool(4) as pool:
        assert {
            verified
            for _, _, verified in pool.values(streamed, str(tmp_path), str(file), {"tp": 4}, "auto", False, "auto")
        } == {False}
        lading.load_model("far", stream=True, progress=False)  # one process sees all bytes, and records their digests
        # Rows of a matrix that is cut along its columns are not whole blocks, unless the ranks read together.
        for sizes, together, expected in (
            ({"tp": 4}, False, True),
            ({"sdp": 4}, False, False),
            ({"sdp": 4}, True, True),
        ):
            found = pool.values(streamed, str(tmp_path), str(file), sizes, "auto", together, "auto")
            assert {verified for _, _, verified in found} == {expected}, sizes

        server.behavior = damaged
        outcomes = pool.run(streamed, str(tmp_path), str(file), {"tp": 4}, "auto", False, "auto")
    kinds = [type(outcome.error).__name__ for outcome in outcomes]
    assert "DigestMismatchError" in kinds
    assert set(kinds) <= {"DigestMismatchError", "GangError"}


def on_a_host(host: str, home: str) -> tuple[bool, int]:
    os.environ |= environment(Path(home))
    world._host_name = lambda: host
    with create_gangs("cpu", tp=2) as gangs:
        _, report = load_with_report("far", gangs=gangs, progress=False, stream=True)
        return report.streamed, gangs.root.local_size


def test_files_on_one_of_two_hosts_are_fetched_to_none(server: Server, tmp_path: Path) -> None:
    lading.load_model("far", progress=False)  # the files are on the first host now
    (blob,) = [
        path for path in (tmp_path / "cache" / "blobs").rglob("*") if path.is_file() and path.stat().st_size > 1e6
    ]
    with Pool(2) as pool:  # one of its own: its processes change hosts
        assert pool.values(on_a_host, str(tmp_path), each=["a", "b"]) == [(True, 1)] * 2
        assert pool.values(on_a_host, str(tmp_path), each=["a", "a"]) == [(False, 2)] * 2
    assert blob.exists()


# --- when something fails ---------------------------------------------------------------------------------------------


class Holds:
    """A server that sends a part of the weights, and then nothing, until it is let go."""

    def __init__(self) -> None:
        self.holding = threading.Event()
        self.go = threading.Event()

    def __call__(self, exchange: Exchange) -> None:
        wanted = exchange.wanted()
        if wanted is None or wanted[0] < 9 << 20:
            honest(exchange)
            return
        self.holding.set()
        self.go.wait(60)
        exchange.close()


def waits(home: str, together: bool) -> tuple[str, float]:
    """The error that ends a load, and the seconds until its thread is gone."""
    os.environ |= environment(Path(home))
    with create_gangs("cpu", tp=2, timeout=timedelta(seconds=60)) as gangs:
        error = raised_by(
            lambda: load_with_report("far", gangs=gangs, progress=False, stream=True, cooperative=together)
        )
        left = [thread.name for thread in threading.enumerate() if thread.name.startswith("lading-reader")]
        assert not left, left
    if isinstance(error, KeyboardInterrupt):
        raise RuntimeError("interrupted")
    raise error


@pytest.mark.parametrize(
    ("together", "number"),
    [
        (False, signal.SIGKILL), (True, signal.SIGINT),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in [(False, signal.SIGINT), (True, signal.SIGKILL)]),
    ],
)  # fmt: skip
def test_a_rank_that_ends_ends_all(server: Server, tmp_path: Path, together: bool, number: signal.Signals) -> None:
    server.behavior = holds = Holds()
    with Pool(2) as pool:
        pool.start(waits, str(tmp_path), together)
        assert holds.holding.wait(60)
        time.sleep(0.5)
        struck = time.monotonic()
        pool.send(1, number)
        outcomes = pool.collect(within=90, without=[1] if number is signal.SIGKILL else [])
        took = time.monotonic() - struck
        holds.go.set()
    assert took < 10
    check_gang_errors(outcomes[:1], 1)


def test_a_changed_object_ends_all(server: Server, tmp_path: Path, data: bytes) -> None:
    """Another object appears under the address after some ranges were read."""

    def changes(exchange: Exchange) -> None:
        if exchange.wanted() is not None and exchange.hub.count("ranges") > 6:
            exchange.hub.files = {"/m/model.safetensors": data[:-4] + b"new!"}
        honest(exchange)

    server.behavior = changes
    with Pool(2) as pool:
        outcomes = pool.run(waits, str(tmp_path), False)
    kinds = {type(outcome.error).__name__ for outcome in outcomes}
    assert kinds <= {"FetchError", "GangError"}
    assert "FetchError" in kinds
    assert any("changed" in str(outcome.error) for outcome in outcomes)
