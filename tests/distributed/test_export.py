"""A model over gangs, written by all ranks together, is what one process would write."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load, load_file

from lading import GangError, LadingError, NotSupportedError, export_model, load_model, simulate_gangs
from lading.models.hf_config import family_of_folder
from tests.distributed.gang_tools import gangs_of
from tests.distributed.workers import Pool
from tests.helpers.make_checkpoint import make, tensors
from tests.servers.s3 import Bucket


def load_and_export(source: Path, folder: Path | str, axes: tuple[int, int, int], shard_size: int) -> dict[str, int]:
    torch.set_num_threads(1)
    gangs = gangs_of(device="cpu", tp=axes[0], sdp=axes[1], pp=axes[2])
    family, config = family_of_folder(source)
    model = load_model(source, gangs=gangs, dtype="auto", progress=False)
    report = export_model(model, family, config, folder, gangs=gangs, shard_size=shard_size, beside=source)
    assert sum(report.dtypes.values()) == report.parameters
    return dict(report.files)


def check(folder: Path) -> None:
    found = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    expected = tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.few(2)
@pytest.mark.parametrize("axes", [(2, 1, 1), (1, 2, 1), (1, 1, 1), (1, 1, 2)], ids=["tp", "sdp", "rdp", "pp"])
def test_two_ranks(pool2: Pool, tmp_path: Path, axes: tuple[int, int, int]) -> None:
    make(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    first, second = pool2.values(load_and_export, tmp_path / "in", tmp_path / "out", axes, 20_000)

    assert first == second == {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}
    assert len(first) >= 3 + 3  # shards; index, config and tokenizer
    check(tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


def export_to_store(source: Path, place: str, env: dict[str, str], fault: bool) -> object:
    with patch.dict(os.environ, env):
        os.environ.pop("SSL_CERT_DIR", None)
        if not fault:
            return load_and_export(source, place, (2, 1, 1), 20_000)
        return export_with_a_fault(source, place, "disk")


def test_two_ranks_and_an_object_store(pool2: Pool, s3: Bucket, tmp_path: Path) -> None:
    make(tmp_path / "in")
    env = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    outcomes = pool2.run(export_to_store, tmp_path / "in", f"{s3.uri}/out", env, True)
    assert all(isinstance(outcome.error, LadingError | OSError) for outcome in outcomes), outcomes
    assert (s3.names(), s3.uploads()) == ([], [])

    first, second = pool2.values(export_to_store, tmp_path / "in", f"{s3.uri}/out", env, False)
    assert first == second == {key.removeprefix("out/"): len(s3.get(key)) for key in s3.names()}
    found = {name: t for key in first if key.endswith("ors") for name, t in load(s3.get(f"out/{key}")).items()}
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name], value) for name, value in tensors().items())


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(2, 2, 1), (4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)])
@pytest.mark.parametrize("shard_size", [3000, 20_000, 10**9])
def test_four_ranks(pool4: Pool, tmp_path: Path, axes: tuple[int, int, int], shard_size: int) -> None:
    make(tmp_path / "in")
    pool4.values(load_and_export, tmp_path / "in", tmp_path / "out", axes, shard_size)
    check(tmp_path / "out")


def export_with_a_fault(source: Path, folder: Path | str, fault: str) -> None:
    gangs = gangs_of(device="cpu", tp=2)
    family, config = family_of_folder(source)
    model = load_model(source, gangs=gangs, dtype="auto", progress=False)
    if gangs.root.rank == 1 and fault == "other":
        folder = Path(folder).with_name("other")
    if gangs.root.rank == 1 and fault in ("disk", "memory"):
        import lading.operations.export

        class Full(lading.operations.export.Writer):
            def write(self, data: memoryview) -> None:
                raise (MemoryError if fault == "memory" else OSError)(
                    28, "No space left on device", "the disk of rank 1"
                )

        original, lading.operations.export.Writer = lading.operations.export.Writer, Full  # type: ignore[misc]
        try:
            export_model(model, family, config, folder, gangs=gangs, shard_size=20_000)
        finally:
            lading.operations.export.Writer = original  # type: ignore[misc]
    else:
        export_model(model, family, config, folder, gangs=gangs, shard_size=20_000)


@pytest.mark.few(2)
@pytest.mark.parametrize("fault", ["other", "disk", "memory", "full"])
def test_a_fault_on_one_rank_raises_on_all(pool2: Pool, tmp_path: Path, fault: str) -> None:
    make(tmp_path / "in")
    if fault == "full":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
    outcomes = pool2.run(export_with_a_fault, tmp_path / "in", tmp_path / "out", fault)

    assert all(isinstance(o.error, LadingError | OSError | MemoryError) for o in outcomes), outcomes
    if fault in ("disk", "memory"):
        assert isinstance(outcomes[0].error, GangError)
        assert "No space left" in str(outcomes[0].error)
    if fault == "full":
        assert all(isinstance(o.error, FileExistsError) for o in outcomes)
    assert {p.name for p in tmp_path.iterdir()} == {"in"} | ({"out"} if fault == "full" else set())


def test_simulated_gangs_hold_a_part_only(tmp_path: Path) -> None:
    make(tmp_path / "in")
    family, config = family_of_folder(tmp_path / "in")
    with simulate_gangs(0, tp=2) as gangs:
        model = load_model(tmp_path / "in", gangs=gangs, progress=False)
        with pytest.raises(NotSupportedError, match="simulated"):
            export_model(model, family, config, tmp_path / "out", gangs=gangs)
    assert json.loads((tmp_path / "in" / "config.json").read_text())["model_type"] == "qwen3"
