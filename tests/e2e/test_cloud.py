"""Models in object stores: exported to them, and used from them."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load, load_file, save_file

from lading import export_model, load_model
from lading.models.hf_config import family_of_folder
from tests.helpers.make_checkpoint import make, tensors
from tests.servers.s3 import SECRET, Bucket, Moto, Request

Cli = Callable[..., Result]

SHARDS = [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]


def state_of(bucket: Bucket, prefix: str) -> dict[str, torch.Tensor]:
    keys = [key for key in bucket.names() if key.startswith(prefix) and key.endswith(".safetensors")]
    return {name: tensor for key in keys for name, tensor in load(bucket.get(key)).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# --- export -----------------------------------------------------------------------------------------------------------


def test_an_export(cli: Cli, cards: Path, s3: Bucket, moto: Moto, tmp_path: Path) -> None:
    (cards.parent / "tiny" / "tokenizer.json").write_text("{}")
    place = f"{s3.uri}/models/ti ny-ü"
    shown = json.loads(cli("export", "tiny", place, "--shard-size", "20KB", "--json", "--no-progress").stdout)

    assert shown["folder"] == place
    names = {key.removeprefix("models/ti ny-ü/") for key in s3.names()}
    assert names == {*SHARDS, "model.safetensors.index.json", "config.json", "tokenizer.json"}
    assert {each["name"]: each["bytes"] for each in shown["files"]} == {
        name: len(s3.get(f"models/ti ny-ü/{name}")) for name in names
    }
    assert_equal(state_of(s3, "models/"), tensors())
    # The objects that make the others a checkpoint come last.
    written = [each.path.rpartition("/")[2] for each in moto.requests if each.method == "PUT"]
    assert written[-2:] == ["model.safetensors.index.json", "config.json"]
    assert not any(SECRET in str(path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file())

    result = cli("export", "tiny", place, code=2)
    assert "expected no objects there" in result.stderr
    assert "broken off" not in result.stderr
    s3.client.delete_object(Bucket=s3.name, Key="models/ti ny-ü/config.json")
    assert "as an export that was broken off leaves it" in cli("export", "tiny", place, code=2).stderr


def test_a_place_that_nothing_is_exported_to(cli: Cli, cards: Path, s3: Bucket) -> None:
    for place in ("hg://org/name", "https://host/x", f"{s3.uri}/a//b", f"{s3.uri}/x?X-Amz-Signature=123"):
        assert "123" not in cli("export", "tiny", place, code=2).stderr
    assert s3.names() == []


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of more than one part of an upload."""
    folder = make(tmp_path_factory.mktemp("large"), vocab_size=300_000)
    embedding = torch.arange(300_000 * 32).reshape(300_000, 32).to(torch.bfloat16)
    state = tensors() | {"model.embed_tokens.weight": embedding}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def is_part(request: Request, number: int) -> bool:
    return request.method == "PUT" and request.query.get("partNumber") == str(number)


@pytest.mark.parametrize("fault", ["part", "complete", "small"])
def test_an_upload_that_fails_leaves_nothing(cli: Cli, large_model: Path, s3: Bucket, moto: Moto, fault: str) -> None:
    def behavior(request: Request) -> tuple[int, str, dict[str, str]] | None:
        fails = {
            "part": is_part(request, 2),
            "complete": request.method == "POST" and "uploadId" in request.query,
            "small": request.method == "PUT" and request.path.endswith("config.json"),
        }
        return (403, "AccessDenied", {}) if fails[fault] else None

    moto.behavior = behavior
    result = cli("convert", large_model, f"{s3.uri}/out", "--no-progress", code=7)
    assert "AWS_ACCESS_KEY_ID" in result.stderr
    assert "Traceback" not in result.stderr
    assert (s3.names(), s3.uploads()) == ([], [])


def test_ctrl_c_leaves_nothing(cli: Cli, large_model: Path, s3: Bucket, moto: Moto) -> None:
    interrupted = threading.Event()

    def behavior(request: Request) -> None:
        if is_part(request, 1) and not interrupted.is_set():
            interrupted.set()
            os.kill(os.getpid(), signal.SIGINT)

    moto.behavior = behavior
    cli("convert", large_model, f"{s3.uri}/out", "--no-progress", code=130)
    assert interrupted.is_set()
    assert (s3.names(), s3.uploads()) == ([], [])


def test_a_large_export_in_parts(large_model: Path, s3: Bucket, moto: Moto) -> None:
    family, config = family_of_folder(large_model)
    model = load_model(large_model, progress=False)
    report = export_model(model, family, config, f"{s3.uri}/out", beside=large_model)

    assert report.folder == f"{s3.uri}/out"
    assert sum(is_part(each, 2) for each in moto.requests) == 1
    assert_equal(state_of(s3, "out"), load_file(large_model / "model.safetensors"))
