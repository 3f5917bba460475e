"""The example under torchrun; and two hosts that fetch once each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lading.gangs import create_gangs, world
from lading.models.hub import load_model
from tests.distributed.tiny_models import whole
from tests.distributed.workers import Pool
from tests.helpers.make_checkpoint import make, qwen_card
from tests.servers.hostile import serve

ROOT = Path(__file__).parents[2]


def test_the_example(tmp_path: Path) -> None:
    folder = make(tmp_path / "tiny", shards=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "examples/many_devices.py", str(folder), "--tp", "2"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("rank 0 (sdp 0, tp 0): ")
    assert second.startswith("rank 1 (sdp 0, tp 1): ")
    assert first.partition("next token")[2] == second.partition("next token")[2] != ""


def move_to(host: str, home: str) -> None:
    """Have this process be on another host, with a disk of its own."""
    folder = Path(home) / host
    os.environ |= {"LADING_CACHE_DIR": str(folder / "cache"), "LADING_DATABASE_URL": f"sqlite:///{folder}/c.sqlite"}
    os.environ |= {"LADING_CARDS": str(Path(home) / "far.yaml"), "XDG_CONFIG_HOME": str(folder)}
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"LADING_OFFLINE": "", "NO_PROXY": "127.0.0.1"}
    world._host_name = lambda: host


def load_on(host: str, home: str) -> tuple[str, dict[str, torch.Tensor], int]:
    move_to(host, home)
    with create_gangs("cpu", tp=2, sdp=2) as gangs:
        model = load_model("far", gangs=gangs, dtype="auto", progress=False)
        return host, {name: whole(p).detach().clone() for name, p in model.named_parameters()}, gangs.root.local_size


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(4) as pool:  # one of its own: its processes change hosts
        yield pool


def test_each_of_two_hosts_fetches_once(pool: Pool, tmp_path: Path) -> None:
    file = make(tmp_path / "origin") / "model.safetensors"
    with serve({"/model.safetensors": file.read_bytes()}, digests=True) as server:
        (tmp_path / "far.yaml").write_text(qwen_card("far", server.url("/model.safetensors")))
        found = pool.values(load_on, str(tmp_path), each=["a", "a", "b", "b"])
        asked = [headers.get("range") for method, _, headers in server.requests if method == "GET"]

    # Rank 0 has read the header, and one rank of each host has fetched the file.
    assert len(asked) == 3
    assert asked.count(None) == 2
    assert [(host, neighbors) for host, _, neighbors in found] == [("a", 2), ("a", 2), ("b", 2), ("b", 2)]
    expected = load_file(file)
    for _, tensors, _ in found:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
        assert len(tensors) == len(expected)
    for host in "ab":
        (kept,) = (tmp_path / host / "cache").rglob("*.safetensors")
        assert kept.read_bytes() == file.read_bytes()


# --- two hosts, as far as the kernel can make them of one ------------------------------------------------------------

PORT = 8931
"""Of a web server on the loopback interface of each host, which is that host's alone."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def two_networks() -> Iterator[dict[str, tuple[str, str]]]:
    """Two network namespaces that a cable joins: name → (address, interface)."""
    tag = f"lad{os.getpid() % 100_000}"
    found = {f"{tag}{end}": (f"10.213.7.{n}", f"{tag}{end}") for n, end in enumerate("ab", start=1)}
    with ExitStack() as stack:
        for name in found:
            try:
                ip("netns", "add", name)
            except (FileNotFoundError, subprocess.CalledProcessError) as error:
                pytest.skip(f"this machine makes no network namespaces: {getattr(error, 'stderr', error)}")
            stack.callback(ip, "netns", "delete", name)
        (a, (_, cable)), (b, (_, other)) = found.items()
        ip("link", "add", cable, "netns", a, "type", "veth", "peer", "name", other, "netns", b)
        for name, (address, interface) in found.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("cooperative", [False, True])
def test_two_hosts_with_networks_of_their_own(
    two_networks: dict[str, tuple[str, str]], tmp_path: Path, cooperative: bool
) -> None:
    file = make(tmp_path / "origin") / "model.safetensors"
    (tmp_path / "far.yaml").write_text(qwen_card("far", f"http://127.0.0.1:{PORT}/model.safetensors"))
    master, _ = next(iter(two_networks.values()))
    started = []
    for number, (name, (_, interface)) in enumerate(two_networks.items()):
        environment = os.environ | {"MASTER_ADDR": master, "MASTER_PORT": "29400", "GLOO_SOCKET_IFNAME": interface}
        command = [sys.executable, "-m", "tests.distributed.one_host", str(number), str(PORT), str(tmp_path)]
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command, *(["together"] if cooperative else [])],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            )
        )  # fmt: skip
    hosts = []
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        hosts.append(json.loads(out))

    expected = {name: tensor.float().sum().item() for name, tensor in load_file(file).items()}
    for number, host in enumerate(hosts):
        # Rank 0 has read the header, and one rank of each host has fetched the file.
        assert host["whole"] == 1
        assert host["ranges"] == (1 if number == 0 else 0)
        assert [rank["neighbors"] for rank in host["ranks"]] == [2, 2]
        for rank in host["ranks"]:
            assert rank["sums"] == expected
        if cooperative:
            assert sum(rank["read"] for rank in host["ranks"]) <= 1.05 * file.stat().st_size
        (kept,) = (tmp_path / str(number) / "cache").rglob("*.safetensors")
        assert kept.read_bytes() == file.read_bytes()
