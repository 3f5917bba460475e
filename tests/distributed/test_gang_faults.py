"""Faults of a rank at any time: all others raise in time, and no rank waits in vain."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lading.errors import CorruptModelCheckpointError, GangError
from tests.distributed.gang_tools import TIMEOUT, check_gang_errors, gangs_of, raised_by
from tests.distributed.workers import Pool

# --- a fault at every step -------------------------------------------------------------------------------------------
#
# Each of these has a pool of its own, as a rank of it dies. `point` is where the victim is when it does.


def step(point: str, victim: int, timeout: float, mark: str) -> None:
    """All ranks go the way of a load; the victim stays at ``point`` and is sent a signal there."""

    def stay() -> None:
        Path(mark).touch()
        time.sleep(60)

    here = int(os.environ["RANK"]) == victim
    if point == "create":
        dist.init_process_group("gloo")
        if here:
            stay()
    gangs = gangs_of(timeout=timeout, tp=2)
    root = gangs.root
    if here and point == "before":
        stay()
    root.first(lambda: stay() if here and point == "produce" else 1)
    if here and point == "after":
        stay()
    if here and point == "reduce":
        stay()
    gangs.tp.all_reduce(torch.ones(3))
    if point == "all reduce":
        root.all_reduce(torch.ones(3)) if not here else stay()
    if here and point == "wait":
        Path(mark).touch()
    elif point == "wait":
        time.sleep(1.5)
    root.agree()


@contextmanager
def _struck(
    tmp_path: Path,
    point: str,
    victim: int,
    number: signal.Signals,
    *,
    size: int = 4,
    timeout: float = 3600,  # a death is not learned of by waiting
    agent: bool = True,
) -> Iterator[Pool]:
    mark = tmp_path / "mark"
    with Pool(size, agent=agent) as pool:
        pool.start(step, point, victim, timeout, str(mark))
        while not mark.exists():
            time.sleep(0.01)
        time.sleep(0.3)  # for the others to arrive where they wait
        pool.send(victim, number)
        yield pool


POINTS = ("before", "after", "reduce", "all reduce", "wait")
KILLED = [
    ("produce", 0), ("before", 3), ("after", 0), ("reduce", 3), ("wait", 0),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [("before", 0), ("reduce", 0), ("all reduce", 0)]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [("after", 3), ("all reduce", 3), ("wait", 3)]),
]  # fmt: skip
STOPPED = [pytest.param("reduce", 3, marks=pytest.mark.slow), ("wait", 0)]


@pytest.mark.few(2)
@pytest.mark.parametrize(("point", "victim"), KILLED)
def test_a_rank_is_killed(tmp_path: Path, point: str, victim: int) -> None:
    with _struck(tmp_path, point, victim, signal.SIGKILL) as pool:
        outcomes = pool.collect()
    assert outcomes.pop(victim).dead
    check_gang_errors(outcomes, victim)


@pytest.mark.parametrize(("point", "victim"), STOPPED)
def test_a_rank_is_stopped_and_goes_on_too_late(tmp_path: Path, point: str, victim: int) -> None:
    with _struck(tmp_path, point, victim, signal.SIGSTOP, timeout=TIMEOUT) as pool:
        check_gang_errors(pool.collect(without=[victim]), victim)
        if point == "wait":
            pool.send(victim, signal.SIGCONT)
            assert isinstance(pool.collect()[victim].error, GangError)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_is_killed_that_served_the_store(tmp_path: Path, victim: int) -> None:
    with _struck(tmp_path, "after", victim, signal.SIGKILL, size=2, agent=False) as pool:
        outcomes = pool.collect()
    assert outcomes.pop(victim).dead
    check_gang_errors(outcomes, victim)


def interrupted(victim: int, mark: str) -> Any:
    root = gangs_of().root
    if root.rank != victim:
        time.sleep(2)
    else:
        Path(mark).touch()
    raised = raised_by(root.agree)
    again = raised_by(lambda: root.agree(raised))
    root.agree()
    return type(raised), again is raised, str(raised)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_is_interrupted_while_it_waits(tmp_path: Path, victim: int) -> None:
    mark = tmp_path / "mark"
    with Pool(2) as pool:
        pool.start(interrupted, victim, str(mark))
        while not mark.exists():
            time.sleep(0.01)
        time.sleep(0.3)
        pool.send(victim, signal.SIGINT)
        outcomes = [outcome.get() for outcome in pool.collect()]
    assert outcomes.pop(victim)[:2] == (KeyboardInterrupt, True)
    assert outcomes == [(GangError, True, f"rank {victim}: KeyboardInterrupt")]


def leaves(how: str, watched: str) -> None:
    root = gangs_of().root
    if root.rank == 1:
        if how == "close":
            gangs_of().close()
            return
        if how == "exit":
            os._exit(0)
        child = os.fork()
        if child == 0:
            while Path(watched).exists():  # as a worker of a data loader that has not noticed yet
                time.sleep(0.01)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    root.agree()


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["close", "exit", "fork"])
def test_a_rank_leaves(tmp_path: Path, how: str) -> None:
    watched = tmp_path / "watched"
    watched.touch()
    with Pool(2) as pool:
        pool.start(leaves, how, str(watched))
        try:
            check_gang_errors(pool.collect(without=[1]), 1)
        finally:
            watched.unlink()


def learns_and_leaves(victim: int, leaver: int, how: str, mark: str, left: str) -> None:
    """One learns of a failure and leaves, before two others look what there is to learn."""
    gangs = gangs_of(timeout=TIMEOUT, tp=2)
    root = gangs.root
    if root.rank == victim:
        Path(mark).touch()
        time.sleep(600)
    if root.rank == leaver:
        calls = {"collective": partial(gangs.tp.all_reduce, torch.ones(3)), "agree in tp": gangs.tp.agree}
        error = raised_by(calls.get(how, root.agree))
        if how == "exit":
            Path(left).touch()
            os._exit(1)
        gangs.close()
        Path(left).touch()
        raise error
    while not Path(left).exists():
        time.sleep(0.01)
    time.sleep(1)  # for the news to come
    root.agree()


@pytest.mark.parametrize(
    ("victim", "leaver", "how", "number"),
    [
        (1, 2, "agree", signal.SIGKILL),
        pytest.param(1, 0, "collective", signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(1, 0, "agree", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, 2, "exit", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(2, 3, "collective", signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(0, 1, "agree in tp", signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_who_leaves_because_of_a_failure_is_not_its_cause(
    tmp_path: Path, victim: int, leaver: int, how: str, number: signal.Signals
) -> None:
    mark, left = tmp_path / "mark", tmp_path / "left"
    with Pool(4) as pool:
        pool.start(learns_and_leaves, victim, leaver, how, str(mark), str(left))
        while not mark.exists():
            time.sleep(0.01)
        pool.send(victim, number)
        while not left.exists():
            time.sleep(0.01)
        if (victim, number) == (0, signal.SIGSTOP):
            pool.send(victim, signal.SIGCONT)  # it passes on what it finds
        outcomes = pool.collect(without=[victim] if how != "exit" else [victim, leaver])
    check_gang_errors(outcomes, victim)


def error_amid_collectives() -> Any:
    gangs = gangs_of(tp=2)
    root = gangs.root
    try:
        if root.rank == 3:
            raise CorruptModelCheckpointError("/x", "bad header")
        gangs.tp.all_reduce(torch.ones(3))
        root.all_reduce(torch.ones(3))
    except Exception as ex:
        error: Exception | None = ex
    else:
        error = None
    raised = raised_by(lambda: root.agree(error))
    root.agree()  # control goes on, whatever has become of the process groups
    return type(raised), str(raised)


def test_an_error_reaches_those_who_are_in_a_collective() -> None:
    with Pool(4) as pool:
        outcomes = pool.values(error_amid_collectives)
    assert outcomes.pop()[0] is CorruptModelCheckpointError
    assert outcomes == [(GangError, "rank 3: CorruptModelCheckpointError: bad header")] * 3


# --- the long matrix -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1, 5, 7])
@pytest.mark.parametrize("point", ["create", *POINTS])
def test_one_of_eight_is_struck(tmp_path: Path, point: str, victim: int, number: signal.Signals) -> None:
    if number == signal.SIGSTOP and point == "wait" and victim != 0:
        victim = 0  # another one arrives before it is stopped, so that no rank has to wait for it
    with _struck(tmp_path, point, victim, number, size=8, timeout=TIMEOUT) as pool:
        check_gang_errors(pool.collect(without=[victim]), victim)


def many_calls(seed: int) -> int:
    gangs, draw = gangs_of(tp=2, sdp=2), random.Random(seed)
    failures = 0
    for i in range(200):
        bad = draw.choice([None] * 6 + [draw.randrange(8)])
        call = draw.choice(["first", "agree", "barrier", "tp", "sdp"])
        time.sleep(random.random() * 0.003)
        try:
            if bad == gangs.root.rank:
                raise ValueError(i)
            if call == "first":
                assert gangs.root.first(partial(int, i)) == i
            elif call == "tp":
                assert gangs.tp.first(partial(int, i)) == i
            elif call == "sdp":
                gangs.sdp.agree()
            elif call == "barrier":
                gangs.root.barrier()
        except (GangError, ValueError) as ex:
            error: Exception | None = ex
        else:
            error = None
        try:
            gangs.root.agree(error)
        except (GangError, ValueError):
            failures += 1
            assert bad is not None
        else:
            assert bad is None
    return failures


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_calls_stay_in_step_through_errors(seed: int) -> None:
    with Pool(8) as pool:
        assert len(set(pool.values(many_calls, seed, within=280))) == 1
