"""Gangs of real processes: what one rank gets all get, and who differs is named."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lading.errors import CorruptModelCheckpointError, GangError, InternalError, ModelGatedError
from lading.gangs import Gang, create_gangs
from lading.gangs.coordinator import GREETING
from lading.gangs.failure import KNOWN
from tests.distributed.gang_tools import check_gang_errors, gangs_of, raised_by
from tests.distributed.workers import Pool

# --- layout ----------------------------------------------------------------------------------------------------------


def layout(sizes: dict[str, int]) -> dict[str, Any]:
    gangs = gangs_of(**sizes)
    named = {name: getattr(gangs, name) for name in ("root", "dp", "rdp", "sdp", "ep", "tp", "pp")}
    assert gangs.mesh is not None
    for name, gang in named.items():
        assert gang.ranks[gang.rank] == gangs.root.rank
        assert gang.size == len(gang.ranks)
        assert (gang.group is None) == (gang.size == 1)
        if gang.group is not None:
            assert torch.distributed.get_process_group_ranks(gang.group) == list(gang.ranks)
        assert gang.mesh is not None
        axes = {"root": ("pp", "rdp", "sdp", "ep", "tp"), "dp": ("rdp", "sdp")}.get(name, (name,))
        assert gang.mesh.mesh_dim_names == axes
        assert gang.mesh.mesh.flatten().tolist() == list(gang.ranks)
    return {name: gang.ranks for name, gang in named.items()}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, {"tp": (3,), "sdp": (3,), "rdp": (0, 1, 2, 3), "pp": (3,), "dp": (0, 1, 2, 3)}),
        ({"tp": 2}, {"tp": (2, 3), "sdp": (3,), "rdp": (1, 3), "pp": (3,), "dp": (1, 3)}),
        ({"tp": 2, "sdp": 2}, {"tp": (2, 3), "sdp": (1, 3), "rdp": (3,), "pp": (3,), "dp": (1, 3)}),
        ({"sdp": 2}, {"tp": (3,), "sdp": (2, 3), "rdp": (1, 3), "pp": (3,), "dp": (0, 1, 2, 3)}),
        ({"pp": 2, "sdp": 2}, {"tp": (3,), "sdp": (2, 3), "rdp": (3,), "pp": (1, 3), "dp": (2, 3)}),
        ({"ep": 2}, {"tp": (3,), "sdp": (3,), "rdp": (1, 3), "pp": (3,), "dp": (1, 3), "ep": (2, 3)}),
        ({"ep": 2, "tp": 2}, {"tp": (2, 3), "sdp": (3,), "rdp": (3,), "pp": (3,), "dp": (3,), "ep": (1, 3)}),
    ],
)
def test_the_last_rank_of_four_is_in_these_gangs(
    pool4: Pool, sizes: dict[str, int], expected: dict[str, tuple[int, ...]]
) -> None:
    assert pool4.values(layout, sizes)[3] == {"root": (0, 1, 2, 3), "ep": (3,), **expected}


def sizes_that_do_not_fit(each: dict[str, int]) -> None:
    create_gangs(timeout=timedelta(seconds=60), **each)


def test_a_size_that_does_not_divide_the_world(pool4: Pool) -> None:
    for outcome in pool4.run(sizes_that_do_not_fit, {"tp": 3}):
        assert isinstance(outcome.error, ValueError)
        assert "`tp` must divide the size of the world, 4, but is 3" in str(outcome.error)
    for outcome in pool4.run(sizes_that_do_not_fit, {"tp": 4, "sdp": 2}):
        assert isinstance(outcome.error, ValueError)
        assert "tp 4 × sdp 2 = 8 must divide the size of the world, 4" in str(outcome.error)


def test_sizes_that_differ_between_ranks(pool4: Pool) -> None:
    outcomes = pool4.run(sizes_that_do_not_fit, each=[{"tp": 2}, {"tp": 2}, {"tp": 4}, {"tp": 2}])
    check_gang_errors(outcomes, 2)
    assert "tp is 4 (on rank 0: 2)" in str(outcomes[0].error)


def test_a_size_that_is_wrong_on_one_rank(pool4: Pool) -> None:
    outcomes = pool4.run(sizes_that_do_not_fit, each=[{"tp": 2}, {"tp": 3}, {"tp": 2}, {"tp": 2}])
    assert isinstance(outcomes.pop(1).error, ValueError)
    check_gang_errors(outcomes, 1)


def hosts() -> Any:
    root = gangs_of().root
    return root.local_rank, root.local_size, len(set(root.hosts))


def test_ranks_of_one_machine_share_a_host(pool4: Pool) -> None:
    assert pool4.values(hosts) == [(r, 4, 1) for r in range(4)]


# --- first -----------------------------------------------------------------------------------------------------------


def first_value() -> Any:
    calls: list[int] = []
    root = gangs_of().root

    def produce() -> dict[str, Any]:
        calls.append(root.rank)
        return {"pid": os.getpid(), "big": b"x" * 5_000_000}

    value = root.first(produce)
    return calls, value["pid"], len(value["big"])


def test_the_first_produces_for_all(pool4: Pool) -> None:
    outcomes = pool4.values(first_value)
    assert [calls for calls, _, _ in outcomes] == [[0], [], [], []]
    assert {(pid, size) for _, pid, size in outcomes} == {(pool4.pid(0), 5_000_000)}


class TwoArgumentsError(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")  # so that it pickles, but does not unpickle


ERRORS: dict[str, Callable[[], BaseException]] = {
    "gated": lambda: ModelGatedError("a", "https://example.com"),
    "corrupt": lambda: CorruptModelCheckpointError(Path("/x"), "bad header"),
    "missing": lambda: FileNotFoundError(2, "No such file", "/x"),
    "value": lambda: ValueError("seven"),
    "memory": lambda: MemoryError("out of memory"),
    "local": lambda: type("LocalError", (Exception,), {})("not importable"),
    "two": lambda: TwoArgumentsError("a", "b"),
    "holds": lambda: RuntimeError("holds a lock", threading.Lock()),
    "interrupt": lambda: KeyboardInterrupt(),
    "exit": lambda: SystemExit(3),
}
TRAVELS = {"gated", "corrupt", "missing", "value", "memory"}


def first_error(name: str) -> Any:
    root = gangs_of().root
    error = ERRORS[name]()

    def produce() -> None:
        raise error

    raised = raised_by(lambda: root.first(produce))
    root.agree()
    own = raised is error
    return own, type(raised).__name__, str(raised), getattr(raised, "ranks", None), vars(raised)


@pytest.mark.parametrize("name", ERRORS)
def test_what_the_first_raises_all_raise(pool2: Pool, name: str) -> None:
    here, there = pool2.values(first_error, name)
    error = ERRORS[name]()
    assert here[0]
    assert not there[0]
    if name in TRAVELS:
        assert there[1:3] == (type(error).__name__, str(error))
        assert "It was raised on rank 0" in there[4].pop("__notes__")[0]
        there[4].pop(KNOWN)
        assert there[4] == vars(error)
    else:
        assert there[1] == "GangError"
        assert there[2].startswith(f"rank 0: {type(error).__name__}")
        assert there[3] == (0,)


def first_unpicklable() -> Any:
    root = gangs_of().root
    raised = raised_by(lambda: root.first(lambda: threading.Lock()))
    root.agree()
    return type(raised), str(raised)


def test_a_value_that_does_not_pickle_is_a_mistake_on_all(pool2: Pool) -> None:
    for kind, text in pool2.values(first_unpicklable):
        assert kind is InternalError
        assert "type lock" in text


def first_late(seconds: float) -> Any:
    return gangs_of(timeout=1.0).root.first(lambda: time.sleep(seconds))


def test_the_first_may_work_for_longer_than_the_timeout(pool2: Pool) -> None:
    assert pool2.values(first_late, 2.5) == [None, None]


# --- agree -----------------------------------------------------------------------------------------------------------


def agree(own: str | None) -> Any:
    root = gangs_of().root
    error = None if own is None else ERRORS[own]()
    raised = raised_by(lambda: root.agree(error))
    cause = raised.__cause__
    root.agree()
    return raised is error, type(raised).__name__, str(raised), getattr(raised, "ranks", None), repr(cause)


def all_agree() -> None:
    gangs_of().root.agree()


def test_no_rank_has_an_error(pool4: Pool) -> None:
    assert pool4.values(all_agree) == [None] * 4


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("name", ERRORS)
def test_one_rank_brings_an_error(pool4: Pool, rank: int, name: str) -> None:
    outcomes = pool4.values(agree, each=[name if r == rank else None for r in range(4)])
    error = ERRORS[name]()
    for r, (own, kind, text, ranks, cause) in enumerate(outcomes):
        assert own == (r == rank)
        if r != rank:
            assert kind == "GangError"
            assert text.startswith(f"rank {rank}: {type(error).__name__}")
            assert ranks == (rank,)
            if name in TRAVELS:
                assert cause == repr(error)


def test_two_ranks_bring_errors(pool4: Pool) -> None:
    outcomes = pool4.values(agree, each=[None, "value", None, "memory"])
    assert [o[0] for o in outcomes] == [False, True, False, True]
    for r in (0, 2):
        assert outcomes[r][1] == "GangError"
        assert outcomes[r][2:4] == ("rank 1: ValueError: seven; rank 3: MemoryError: out of memory", (1, 3))


def test_all_ranks_bring_errors(pool4: Pool) -> None:
    assert all(o[0] for o in pool4.values(agree, each=["value", "memory", "gated", "interrupt"]))


def agree_in_tp(own: str | None) -> Any:
    gangs = gangs_of(tp=2)
    raised = None
    try:
        gangs.tp.agree(None if own is None else ERRORS[own]())
    except BaseException as ex:
        raised = type(ex)
    gangs.root.barrier()
    return raised


def test_an_error_in_a_part_of_the_world_stays_there(pool4: Pool) -> None:
    outcomes = pool4.values(agree_in_tp, each=[None, None, None, "value"])
    assert outcomes == [None, None, GangError, ValueError]


def early_and_late(own: str | None, heard: str) -> Any:
    root = gangs_of().root
    marks = [Path(heard, str(rank)) for rank in (0, 1)]
    if own is None and root.rank != 0:
        while not all(mark.exists() for mark in marks):
            time.sleep(0.01)
    raised = raised_by(lambda: root.agree(None if own is None else ERRORS[own]()))
    if root.rank < len(marks):
        marks[root.rank].touch()
    root.agree()
    return type(raised)


def test_an_error_does_not_wait_for_those_who_still_work(pool4: Pool, tmp_path: Path) -> None:
    outcomes = pool4.values(early_and_late, str(tmp_path), each=[None, "value", None, None])
    assert outcomes == [GangError, ValueError, GangError, GangError]


def error_before_first(own: str | None) -> Any:
    root = gangs_of().root
    try:
        if own is not None:
            raise ERRORS[own]()
        root.first(lambda: time.sleep(0.3))
    except BaseException as ex:
        error = ex
        return type(ex), str(raised_by(lambda: root.agree(error)))
    return None, str(raised_by(root.agree))


@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_reaches_those_who_are_at_another_call(pool4: Pool, rank: int) -> None:
    outcomes = pool4.values(error_before_first, each=["value" if r == rank else None for r in range(4)])
    for r, (kind, text) in enumerate(outcomes):
        if r == rank or rank == 0:  # what rank 0 raises reaches those who are at `first` as it is
            assert (kind, text) == (ValueError, "seven")
        else:
            assert (kind, text) == (GangError, f"rank {rank}: ValueError: seven")
    assert pool4.values(all_agree) == [None] * 4


def in_a_block(own: str | None, seconds: float) -> Any:
    root = gangs_of(1.0).root
    done = []

    def block() -> None:
        with root.all_or_none():
            if own is not None:
                raise ERRORS[own]()
            if root.rank == 1:
                time.sleep(seconds)
            done.append(root.rank)

    try:
        block()
    except Exception as ex:
        return done, type(ex)
    return done, None


def test_all_ranks_leave_a_block_or_none(pool2: Pool) -> None:
    # One may be at work for longer than the timeout.
    assert pool2.values(in_a_block, None, 2) == [([0], None), ([1], None)]
    assert pool2.values(in_a_block, 0, each=["value", None]) == [([], ValueError), ([1], GangError)]


def twice(own: list[str]) -> Any:
    root = gangs_of().root
    if not own:
        time.sleep(1.5)
        return [type(raised_by(root.agree)), type(raised_by(root.agree)), root.agree()]
    kinds: list[Any] = [type(raised_by(partial(root.agree, ERRORS[name]()))) for name in own]
    return [*kinds, root.agree()]


def test_a_rank_that_fails_twice_before_others_hear_of_the_first(pool4: Pool) -> None:
    outcomes = pool4.values(twice, each=[[], ["value", "memory"], [], []])
    assert outcomes.pop(1) == [ValueError, MemoryError, None]
    assert outcomes == [[GangError, GangError, None]] * 3


# --- the same calls, the same values ---------------------------------------------------------------------------------


def different_calls(name: str) -> Any:
    root = gangs_of().root
    raised = raised_by({"first": lambda: root.first(lambda: 1), "agree": root.agree, "barrier": root.barrier}[name])
    root.agree()
    return raised.args, type(raised), getattr(raised, "ranks", None)


def test_ranks_that_do_not_do_the_same(pool4: Pool) -> None:
    for args, kind, ranks in pool4.values(different_calls, each=["first", "first", "agree", "first"]):
        assert kind is GangError
        assert args == ("the ranks do not make the same call: ranks 0, 1, 3 at first(), rank 2 at agree()",)
        assert ranks == (2,)
    for args, _, _ in pool4.values(different_calls, each=["barrier", "first", "agree", "first"]):
        assert args[0].endswith("rank 0 at barrier(), ranks 1, 3 at first(), rank 2 at agree()")


@dataclass
class Config:
    width: int = 32
    dtype: torch.dtype = torch.float32
    nested: tuple[dict[str, Any], ...] = ({"a": 1},)


def same(value: Any) -> Any:
    root = gangs_of().root
    try:
        root.same(value, "config")
    except (GangError, TypeError) as ex:
        root.agree()
        return type(ex), str(ex), getattr(ex, "ranks", None)
    return None


def test_all_have_the_same(pool4: Pool) -> None:
    assert pool4.values(same, Config()) == [None] * 4
    assert pool4.values(same, each=[{"a": 1, "b": {2, 3}}, {"b": {3, 2}, "a": 1}] * 2) == [None] * 4


def test_one_has_another(pool4: Pool) -> None:
    one, other = Config(), Config(width=64, nested=({"a": 2, "b": 3},))
    for kind, text, ranks in pool4.values(same, each=[one, other, one, one]):
        assert kind is GangError
        assert ranks == (1,)
        assert text.startswith("the ranks do not have the same config: on rank 1 width is 64 (on rank 0: 32), ")
        assert "nested[0].a is 2 (on rank 0: 1)" in text
        assert "nested[0].b is 3 (on rank 0: missing)" in text


def test_the_first_has_another(pool4: Pool) -> None:
    for _, text, ranks in pool4.values(same, each=["bfloat16", "float32", "float32", "float32"]):
        assert ranks == (0,)
        assert "on rank 0 is 'bfloat16' (on rank 1: 'float32')" in text


def test_a_value_without_a_stable_form(pool2: Pool) -> None:
    outcomes = pool2.values(same, each=[object, object])
    assert [kind for kind, _, _ in outcomes] == [TypeError, TypeError]


# --- collectives -----------------------------------------------------------------------------------------------------


def collectives() -> None:
    gangs = gangs_of(tp=2, sdp=2)
    for gang in (gangs.root, gangs.tp, gangs.sdp, gangs.dp):
        _check_collectives(gang)
    _check_collectives(gangs.rdp)


def _check_collectives(gang: Gang) -> None:
    for source in range(gang.size):
        tensor = torch.full((3,), gang.ranks[gang.rank])
        gang.broadcast(tensor, source)
        assert tensor.tolist() == [gang.ranks[source]] * 3

        objects: list[object] = [gang.rank, "x" * gang.rank]
        gang.broadcast_objects(objects, source)
        assert objects == [source, "x" * source]

    for shape in ((), (2,), (2, 3)):
        output = torch.empty((gang.size, *shape), dtype=torch.int64)
        gang.all_gather(output, torch.full(shape, gang.ranks[gang.rank]))
        expected = torch.stack([torch.full(shape, r) for r in gang.ranks])
        assert torch.equal(output, expected)

    # Rank r sends r + s of its elements to rank s.
    sizes = [gang.rank + s for s in range(gang.size)]
    output = torch.empty(sum(sizes), dtype=torch.int64)
    gang.all_to_all(output, sizes, torch.full((sum(sizes),), gang.rank), sizes)
    assert output.tolist() == [r for r, size in enumerate(sizes) for _ in range(size)]

    values = [float(r + 1) for r in gang.ranks]
    reductions: dict[Any, Callable[[Tensor], Tensor]] = {
        "sum": torch.sum, "mean": torch.mean, "product": torch.prod, "min": torch.min, "max": torch.max
    }  # fmt: skip
    for op, reduce in reductions.items():
        one = torch.tensor([values[gang.rank]])
        gang.all_reduce(one, op)
        assert one.item() == reduce(torch.tensor(values)).item()

    gang.barrier()
    assert gang.gather_objects(gang.rank) == list(range(gang.size))


def test_collectives(pool4: Pool) -> None:
    pool4.values(collectives)


def on_host() -> Any:
    gangs = gangs_of(tp=2, sdp=2)
    with gangs.root.on_host() as host:
        _check_collectives(host)
        found = host.ranks, host.rank, host.device.type
    with gangs.root.on_host() as again:
        _check_collectives(again)
    error = raised_by(lambda: gangs.tp.on_host().__enter__())
    gangs.root.barrier()
    return *found, type(error)


def test_the_ranks_of_a_host_are_a_gang(pool4: Pool) -> None:
    assert pool4.values(on_host) == [((0, 1, 2, 3), rank, "cpu", GangError) for rank in range(4)]


def bad_collectives() -> list[str]:
    root = gangs_of().root
    calls: list[Callable[[], Any]] = [
        lambda: root.all_gather(torch.empty(3), torch.empty(1)),
        lambda: root.all_gather(torch.empty(2, 1), torch.empty(1, dtype=torch.float16)),
        lambda: root.all_gather(torch.empty(2, 4)[:, ::2], torch.empty(2)),
        lambda: root.all_reduce(torch.zeros(1, dtype=torch.int64), "mean"),
        lambda: root.all_reduce(torch.zeros(1), "median"),  # type: ignore[arg-type]
        lambda: root.broadcast(torch.zeros(1), 2),
        lambda: root.broadcast_objects([], -1),
    ]
    errors = [raised_by(call) for call in calls]
    assert all(type(error) is ValueError for error in errors)
    return [str(error) for error in errors]


def test_collectives_check_their_arguments(pool2: Pool) -> None:
    here, there = pool2.values(bad_collectives)
    assert here == there
    assert "(2, 1)" in here[0]
    assert "less than the size of the gang, 2" in here[-1]


# --- worlds -----------------------------------------------------------------------------------------------------------


def existing_group(path: str) -> Any:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    with create_gangs(sdp=2) as one, create_gangs(tp=2) as two:
        both = one.root.first(lambda: "one"), two.root.first(lambda: "two")
        tensor = torch.ones(1)
        two.tp.all_reduce(tensor)
        two.root.barrier()
    return both, tensor.item()


def test_a_process_group_that_is_there_is_used(tmp_path: Path) -> None:
    with Pool(2) as pool:
        assert pool.values(existing_group, str(tmp_path / "store")) == [(("one", "two"), 2.0)] * 2


def strangers() -> Any:
    gangs = gangs_of()
    channel = gangs.root.channel
    assert channel is not None
    if gangs.root.rank == 0:
        assert channel._coordinator is not None
        address = channel._coordinator.sockets[0].getsockname()
        for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n" + b" " * 100, GREETING.pack(b"\0" * 32, 1), b"\0" * 40):
            # They may be sent away before they have said it all.
            with socket.create_connection(address) as sock, suppress(OSError):
                sock.sendall(greeting)
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(100) == b""
        return gangs.root.first(lambda: address[0])
    return gangs.root.first(lambda: None)


def test_strangers_are_sent_away(pool2: Pool) -> None:
    assert pool2.values(strangers) == ["127.0.0.1", "127.0.0.1"]


@pytest.mark.slow
def test_eight_ranks_in_all_layouts() -> None:
    with Pool(8) as pool:
        for pp, sdp, tp in itertools.product((1, 2, 4, 8), repeat=3):
            if 8 % (pp * sdp * tp) == 0:
                found = pool.values(layout, {"pp": pp, "sdp": sdp, "tp": tp})
                for rank, gangs in enumerate(found):
                    assert rank in gangs["tp"]
                    assert gangs["tp"] == tuple(range(rank - rank % tp, rank - rank % tp + tp))


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from lading import create_gangs\n"
        "with create_gangs(tp=2) as gangs:\n"
        "    line = f'{gangs.root.gather_objects(gangs.root.rank)} {gangs.root.first(lambda: 1)}\\n'\n"
        "    print(line, end='', flush=True)\n"  # in one piece, as both ranks write to one pipe
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert out.stdout.splitlines() == ["[0, 1] 1"] * 2
