"""Ranks of a host that read together: the same models, each byte from storage once, and no rank that waits in vain."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lading import formats
from lading.errors import CorruptModelCheckpointError, DigestMismatchError, GangError
from lading.gangs import create_fake_gangs, create_gangs
from lading.models.hub import load_model, load_with_report
from lading.transfer import cooperative
from lading.transfer.files import OpenShard
from tests.distributed.gang_tools import TIMEOUT, check_gang_errors, raised_by
from tests.distributed.workers import Pool
from tests.helpers.make_checkpoint import make, qwen_card


@contextmanager
def small_steps() -> Iterator[None]:
    """Have a checkpoint of a few kilobytes be read in many rounds."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LEAF", 512), ("PAGE", 64), ("ROUND", 2048)):
            patch.setattr(cooperative, name, value)
        yield


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "qwen", shards=3, num_attention_heads=4)


# --- what comes of it ------------------------------------------------------------------------------------------------


def both_ways(folder: Path, sizes: dict[str, int], dtype: torch.dtype | str) -> tuple[list[str], int, int]:
    """What differs between reading alone and together, and the bytes that this rank has read either way."""
    with create_gangs("cpu", **sizes) as gangs, small_steps():  # type: ignore[arg-type]
        options: dict[str, Any] = {"gangs": gangs, "dtype": dtype, "progress": False}
        alone, by_itself = load_with_report(folder, **options)
        model, report = load_with_report(folder, **options, cooperative=True)

    expected = dict(alone.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    different = [name for name, p in found.items() if not torch.equal(local(p), local(expected[name]))]

    return different, by_itself.bytes_read, report.bytes_read


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ({"tp": 4}, "auto"), ({"sdp": 4}, "auto"), ({"tp": 2, "sdp": 2}, torch.float64), ({}, "auto"),
        ({"pp": 2, "tp": 2}, "auto"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ({"tp": 4}, torch.float64), ({"sdp": 4}, torch.float64), ({"tp": 2, "sdp": 2}, "auto"),
                ({}, torch.float64), ({"pp": 2, "tp": 2}, torch.float64),
            ]
        ),
    ],
    ids=str,
)  # fmt: skip
def test_the_model_is_the_same_and_each_byte_is_read_once(
    pool4: Pool, folder: Path, sizes: dict[str, int], dtype: Any
) -> None:
    found = pool4.values(both_ways, folder, sizes, dtype)

    assert [different for different, _, _ in found] == [[]] * 4
    total = formats.index(folder).total_bytes
    assert sum(read for _, _, read in found) <= 1.05 * total
    assert max(read for _, _, read in found) <= 0.35 * total
    if "sdp" not in sizes:
        assert sum(read for _, read, _ in found) > 1.05 * total


def alone_on_its_host(folder: Path) -> tuple[int, int]:
    with create_fake_gangs("cpu") as gangs:
        _, report = load_with_report(folder, gangs=gangs, dtype="auto", progress=False, cooperative=True)
        with gangs.root.on_host() as host:
            return report.bytes_read, host.size


def test_a_rank_that_is_alone_reads_for_itself(folder: Path) -> None:
    read, size = alone_on_its_host(folder)

    assert read == formats.index(folder).total_bytes
    assert size == 1


def test_what_is_mapped_is_not_read_together(folder: Path) -> None:
    with pytest.raises(ValueError, match="`mmap` and `cooperative`"):
        load_model(folder, mmap=True, cooperative=True)


# --- digests ---------------------------------------------------------------------------------------------------------


def verified(home: str) -> tuple[str, int]:
    """What a verified load comes to on this rank: the name of the error or nothing, and the bytes that it has read."""
    os.environ |= {"LADING_DATABASE_URL": f"sqlite:///{home}/c.sqlite", "LADING_CARDS": f"{home}/near.yaml"}
    with create_gangs("cpu", tp=2) as gangs, small_steps():
        try:
            _, report = load_with_report(
                "near", gangs=gangs, dtype="auto", progress=False, verify="always", cooperative=True
            )
        except (DigestMismatchError, GangError) as error:
            return type(error).__name__, 0
        return "", report.bytes_read


def test_what_is_read_together_is_verified(tmp_path: Path) -> None:
    file = make(tmp_path / "model") / "model.safetensors"
    (tmp_path / "near.yaml").write_text(qwen_card("near", file.parent))
    total = formats.index(file).total_bytes
    with Pool(4) as pool:
        # Nothing is known of the bytes: as all of them pass by on this host, they are recorded.
        first = pool.values(verified, str(tmp_path))
        assert [error for error, _ in first] == [""] * 4
        assert sum(read for _, read in first) == total
        assert pool.values(verified, str(tmp_path)) == first

        data = bytearray(file.read_bytes())
        data[-total // 3] ^= 4
        file.write_bytes(data)
        assert {error for error, _ in pool.values(verified, str(tmp_path))} == {"DigestMismatchError"}


# --- when a rank fails -----------------------------------------------------------------------------------------------


@contextmanager
def fails_at(step: int, failure: Any) -> Iterator[None]:
    fill, count = OpenShard.fill, 0

    def filled(self: OpenShard, *args: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == step:
            failure()
        fill(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenShard, "fill", filled)
        yield


def corrupt() -> None:
    raise CorruptModelCheckpointError("/x", "bad bytes")


def one_reads_badly(folder: Path) -> tuple[str, str, bool]:
    with create_gangs("cpu", tp=2) as gangs, small_steps():
        options: dict[str, Any] = {"gangs": gangs, "dtype": "auto", "progress": False, "cooperative": True}
        with fails_at(3 if gangs.root.rank == 2 else -1, corrupt):
            error = raised_by(lambda: load_model(folder, **options))
        # Operations that the failure left unfinished do not disturb later ones.
        again, alone = load_model(folder, **options), load_model(folder, **{**options, "cooperative": False})
        expected = dict(alone.named_parameters())
        same = all(torch.equal(local(p), local(expected[name])) for name, p in again.named_parameters())

    return type(error).__name__, str(error), same


def test_one_rank_reads_badly_and_all_try_again(folder: Path) -> None:
    with Pool(4) as pool:
        found = pool.values(one_reads_badly, folder)

    kind, text, _ = found.pop(2)
    assert (kind, text) == ("CorruptModelCheckpointError", "bad bytes")
    for kind, text, same in found:
        assert (kind, text) == ("GangError", "rank 2: CorruptModelCheckpointError: bad bytes")
        assert same


def one_stays(folder: Path, mark: str, timeout: float) -> None:
    def stay() -> None:
        Path(mark).touch()
        time.sleep(60)

    with create_gangs("cpu", tp=2, timeout=timedelta(seconds=timeout)) as gangs:
        options: dict[str, Any] = {"gangs": gangs, "dtype": "auto", "progress": False, "cooperative": True}
        with small_steps(), fails_at(3 if gangs.root.rank == 1 else -1, stay):
            load_model(folder, **options)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_rank_is_struck_while_it_reads(tmp_path: Path, folder: Path, number: signal.Signals) -> None:
    mark = tmp_path / "mark"
    with Pool(4) as pool:
        pool.start(one_stays, folder, str(mark), TIMEOUT)
        while not mark.exists():
            time.sleep(0.01)
        time.sleep(0.3)  # for the others to come to where they wait
        pool.send(1, number)
        outcomes = pool.collect(without=[1])

    check_gang_errors(outcomes, 1)
