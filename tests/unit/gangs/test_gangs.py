from __future__ import annotations

import os
import pickle
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from itertools import product
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import DeviceMesh

from lading.errors import GangError, ModelGatedError
from lading.gangs import Gang, Gangs, create_fake_gangs, create_gangs, simulate_gangs
from lading.gangs.compare import differences, digest, flatten
from lading.gangs.control import ControlChannel
from lading.gangs.failure import Failure
from lading.gangs.torch_private import default_store, init_fake_process_group, store_host

ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _no_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# --- gangs of one ----------------------------------------------------------------------------------------------------


def _all(gangs: Gangs) -> list[Gang]:
    return [gangs.root, gangs.dp, gangs.rdp, gangs.sdp, gangs.ep, gangs.tp, gangs.pp]


def test_a_gang_of_one_does_all_of_it_alone() -> None:
    with create_fake_gangs("cpu") as gangs:
        assert gangs.mesh is None
        for gang in _all(gangs):
            assert (gang.rank, gang.size, gang.ranks, gang.device) == (0, 1, (0,), torch.device("cpu"))
            assert (gang.local_rank, gang.local_size, gang.local_ranks) == (0, 1, (0,))
            assert gang.first(lambda: 7) == 7
            gang.agree()
            gang.barrier()
            gang.same({"a": 1}, "config")
            assert gang.gather_objects("x") == ["x"]
            objects: list[object] = [1, 2]
            gang.broadcast_objects(objects)
            assert objects == [1, 2]
            tensor, output = torch.tensor([1.0, 2.0]), torch.zeros(1, 2)
            gang.broadcast(tensor)
            gang.all_reduce(tensor, "mean")
            gang.all_gather(output, tensor)
            assert output.tolist() == [[1.0, 2.0]]
            with gang.at_work():
                pass
    assert not dist.is_initialized()


def test_a_gang_of_one_raises_what_is_brought() -> None:
    gang, error = create_fake_gangs("cpu").root, ValueError("seven")
    with pytest.raises(ValueError, match="seven") as caught:
        gang.agree(error)
    assert caught.value is error
    with pytest.raises(ZeroDivisionError):
        gang.first(lambda: 1 // 0)


def test_a_gang_of_one_checks_its_arguments() -> None:
    gang = create_fake_gangs("cpu").root
    with pytest.raises(ValueError, match=r"less than the size of the gang, 1, but is 1"):
        gang.broadcast(torch.zeros(1), 1)
    with pytest.raises(ValueError, match="must have the shape"):
        gang.all_gather(torch.zeros(2, 1), torch.zeros(1))
    with pytest.raises(ValueError, match="median"):
        gang.all_reduce(torch.zeros(1), "median")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no stable form"):
        gang.same(object(), "config")
    with pytest.raises(GangError, match="no process group"):
        gang.as_process_group()


def test_no_gangs_are_on_the_meta_device() -> None:
    for make in (create_fake_gangs, create_gangs, lambda device: simulate_gangs(0, device=device)):
        with pytest.raises(ValueError, match="meta device"):
            make("meta")


def test_members_of_one_host() -> None:
    gang = Gang(rank=3, size=5, device=torch.device("cpu"), ranks=(0, 2, 4, 6, 8), hosts=("a", "b", "a", "b", "b"))
    assert (gang.local_ranks, gang.local_rank, gang.local_size) == ((1, 3, 4), 1, 3)


# --- the environment -------------------------------------------------------------------------------------------------


def test_a_process_that_torchrun_did_not_start_is_a_world_of_its_own() -> None:
    assert create_gangs("cpu") == create_fake_gangs("cpu")
    assert not dist.is_initialized()


def test_a_world_of_one_has_a_process_group_and_a_mesh(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    gangs = create_gangs("cpu")
    assert isinstance(gangs.mesh, DeviceMesh)
    assert gangs.mesh.shape == (1, 1, 1, 1, 1)
    assert all((gang.rank, gang.size, gang.group) == (0, 1, None) for gang in _all(gangs))
    assert gangs.root.first(lambda: 1) == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 2}, "`tp` must divide the size of the world, 1, but is 2"),
        ({"sdp": 0}, "`sdp` must be at least 1, but is 0"),
        ({"pp": -1}, "`pp` must be at least 1, but is -1"),
        ({"tp": 1.0}, "`tp` must be a number of processes, but is 1.0"),
        ({"tp": True}, "`tp` must be a number of processes, but is True"),
    ],
)
def test_sizes_that_are_wrong(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        create_gangs("cpu", **sizes)
    assert str(caught.value) == message


def test_a_timeout_that_is_none() -> None:
    with pytest.raises(ValueError, match="`timeout` must be positive"):
        create_gangs("cpu", timeout=timedelta(0))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "has RANK, WORLD_SIZE, but not MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "`RANK` must be a number"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "less than `WORLD_SIZE`, 2, but is 2",
        ),
    ],
)
def test_an_environment_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(GangError, match=message):
        create_gangs("cpu")


def test_the_others_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(GangError, match=r"rank 1 of 2 cannot find the others at 127\.0\.0\.1:1 within 1 s"):
        create_gangs("cpu", timeout=timedelta(seconds=1))


# --- simulated gangs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1),
        (1, 1, 2, 1, 2),
        (2, 3, 2, 1, 2),
        (1, 4, 1, 1, 2),
        (1, 2, 2, 1, 1),
        (3, 1, 1, 1, 1),
        (1, 1, 1, 4, 1),
        (1, 2, 2, 3, 1),
        (2, 1, 2, 2, 2),
    ],
)
def test_every_rank_of_a_world(shape: tuple[int, int, int, int, int]) -> None:
    pp, rdp, sdp, ep, tp = shape
    for rank, (p, r, s, e, t) in enumerate(product(*map(range, shape))):
        gangs = simulate_gangs(rank, pp=pp, rdp=rdp, sdp=sdp, ep=ep, tp=tp)
        assert gangs.root.rank == rank
        assert (gangs.pp.rank, gangs.rdp.rank, gangs.sdp.rank, gangs.ep.rank, gangs.tp.rank) == (p, r, s, e, t)
        assert gangs.dp.rank == r * sdp + s
        assert [gang.size for gang in _all(gangs)] == [pp * rdp * sdp * ep * tp, rdp * sdp, rdp, sdp, ep, tp, pp]
        assert gangs.tp.ranks == tuple(rank - t + i for i in range(tp))
        for gang in _all(gangs):
            assert gang.ranks[gang.rank] == rank
            assert gang.mesh is not None
            assert gang.mesh.mesh.flatten().tolist() == list(gang.ranks)
            if gang.group is not None:
                assert dist.get_process_group_ranks(gang.group) == list(gang.ranks)
        assert gangs.mesh is not None
        assert gangs.mesh.get_coordinate() == (p, r, s, e, t)


def test_a_simulated_gang_sends_nothing() -> None:
    gangs = simulate_gangs(3, tp=2, sdp=2)
    tensor = torch.ones(2)
    gangs.tp.all_reduce(tensor)
    gangs.root.broadcast(tensor)
    gangs.tp.all_gather(torch.empty(2, 2), tensor)
    assert gangs.root.first(lambda: "mine") == "mine"
    gangs.root.barrier()
    gangs.root.agree()
    with pytest.raises(ValueError, match="seven"):
        gangs.root.agree(ValueError("seven"))
    assert gangs.root.gather_objects(1) == [1]


def test_a_large_world() -> None:
    gangs = simulate_gangs(777, tp=8, sdp=16, rdp=8)
    assert gangs.tp.ranks == tuple(range(776, 784))


def test_ranks_and_sizes_of_a_simulated_world() -> None:
    with pytest.raises(
        ValueError, match=r"less than the size of the world, 4 \(pp 1 × rdp 1 × sdp 2 × ep 1 × tp 2\), but is 4"
    ):
        simulate_gangs(4, tp=2, sdp=2)
    with pytest.raises(ValueError, match="`rdp` must be at least 1, but is 0"):
        simulate_gangs(0, rdp=0)
    assert not dist.is_initialized()


def test_a_real_process_group_is_not_replaced(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    with pytest.raises(GangError, match="has a process group"):
        simulate_gangs(0, tp=2)
    assert dist.get_backend() == "gloo"


# --- values that should be the same ----------------------------------------------------------------------------------


class Color(Enum):
    RED = 1


@dataclass
class Config:
    a: int = 1
    b: Any = None


@dataclass
class Other:
    a: int = 1
    b: Any = None


EQUAL: list[tuple[Any, Any]] = [
    ({"a": 1, "b": 2}, OrderedDict(b=2, a=1)),
    ({3, 1, 2}, frozenset([1, 2, 3])),
    ([1, "x"], (1, "x")),
    (Config(b=[torch.float16, Path("/x")]), Config(b=(torch.float16, Path("/x")))),
    (torch.device("cpu"), torch.device("cpu")),
    (float("nan"), float("nan")),
]
DIFFERENT: list[tuple[Any, Any]] = [
    (1, 1.0),
    (1, True),
    (1, "1"),
    ("a", b"a"),
    (0.0, -0.0),
    ([], ()[:0] or {}),
    ([[1], 2], [1, [2]]),
    ({"a": {"b": 1}}, {"a.b": 1}),
    ({"a": 1}, {"a": 1, "b": None}),
    (Config(), Other()),
    (Config(), {"a": 1, "b": None}),
    (Color.RED, "Color.RED"),
    (torch.float16, torch.bfloat16),
    (torch.float16, "torch.float16"),
    ({1: "x"}, {"1": "x"}),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_values_have_one_digest(one: Any, other: Any) -> None:
    assert digest(one) == digest(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_values_have_two(one: Any, other: Any) -> None:
    assert digest(one) != digest(other)
    assert digest([one]) != digest([other])


def test_the_most_are_right() -> None:
    values: list[Any] = [Config(a=2), Config(a=1), Config(a=1, b={"c": 5})]
    digests, forms = [digest(v) for v in values], [flatten(v) for v in values]
    assert differences([digests[i] for i in (0, 1, 1)], [forms[i] for i in (0, 1, 1)], (0, 4, 8)) == (
        [0],
        "on rank 0 a is 2 (on rank 4: 1)",
    )
    ranks, text = differences([digests[i] for i in (1, 1, 2)], [forms[i] for i in (1, 1, 2)], (0, 4, 8))
    assert ranks == [8]
    assert "b.c is 5 (on rank 0: missing)" in text


def test_many_differences_are_cut() -> None:
    values = [dict.fromkeys("abcdefgh", i) for i in range(2)]
    _, text = differences([digest(v) for v in values], [flatten(v) for v in values], (0, 1))
    assert text.endswith("d is 1 (on rank 0: 0) and 4 more")


# --- failures that travel --------------------------------------------------------------------------------------------


def _travelled(error: BaseException, rank: int = 1) -> Failure:
    failure: Failure = pickle.loads(pickle.dumps(Failure.of(rank, error)))

    return failure


def _raise(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as ex:
        return ex


def test_a_failure_keeps_its_exception() -> None:
    failure = _travelled(_raise(ModelGatedError("a", None)))
    assert (failure.rank, failure.ranks) == (1, (1,))
    there = failure.as_gang_error()
    assert there.ranks == (1,)
    assert there.message.startswith("rank 1: ModelGatedError: 'a' is a gated model")
    assert isinstance(there.__cause__, ModelGatedError)
    assert "in _raise" in there.__cause__.__notes__[0]
    assert pickle.loads(pickle.dumps(there)).ranks == (1,)


UNTOLD: list[Callable[[], BaseException]] = [
    lambda: type("LocalError", (Exception,), {})("x"),
    lambda: RuntimeError(lambda: 0),
]


@pytest.mark.parametrize("make", UNTOLD)
def test_a_failure_whose_exception_cannot_travel(make: Callable[[], BaseException]) -> None:
    there = _travelled(_raise(make())).as_gang_error()
    assert there.__cause__ is None
    assert there.message.startswith(f"rank 1: {type(make()).__name__}: ")
    assert "in _raise" in there.__notes__[0]


def test_who_passes_on_what_it_heard_is_not_to_blame() -> None:
    heard = _travelled(ValueError("seven"), 3).as_gang_error()
    merged = Failure.merge([_travelled(heard, 0), _travelled(ValueError("seven"), 3), _travelled(heard, 2)])
    assert (merged.ranks, merged.text) == ((3,), "rank 3: ValueError: seven")


# --- what torch keeps private ----------------------------------------------------------------------------------------


def test_the_store_of_the_default_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    store = default_store()
    store.set("lading/test", "here")
    assert store.get("lading/test") == b"here"
    assert store_host(store) is None


def test_the_host_of_a_tcp_store() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert store_host(default_store()) == "127.0.0.1"


def test_the_fake_process_group() -> None:
    init_fake_process_group(5, 8)
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (5, 8, "fake")
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    assert tensor.item() == 1
    assert os.environ.get("RANK") is None


# --- hanging up -------------------------------------------------------------------------------------------------------


def test_who_hangs_up_while_another_does_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of a channel has noticed that rank 0 is gone, and ends while its own rank closes the channel."""
    store = dist.HashStore()
    first, second = ControlChannel(store, 0, 2, 60.0), ControlChannel(store, 1, 2, 60.0)
    ends, goes_on, sockets = Event(), Event(), second._sockets

    def held() -> list[socket.socket]:
        ends.set()
        goes_on.wait(10)
        return sockets()

    monkeypatch.setattr(second, "_sockets", held)
    first.close()
    assert ends.wait(10)
    Timer(0.2, goes_on.set).start()
    start = time.monotonic()
    second.close()

    assert time.monotonic() - start < 3
    assert not second._thread.is_alive()
    second.close()  # and once more does no harm
