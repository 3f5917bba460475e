"""Models in object stores: exported to them, and used from them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load, load_file, save_file

from lading import export_model, load_model
from lading.models.hf_config import family_of_folder
from tests.helpers.make_adapter import factors, write_adapter
from tests.helpers.make_checkpoint import CARD_CONFIG, make, tensors
from tests.servers.s3 import KEY, SECRET, Bucket, Moto, Request, find_rclone, rclone_server, use_gcs, use_s3

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


@pytest.mark.few(1)
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


def test_a_large_export_in_parts(cli: Cli, large_model: Path, s3: Bucket, moto: Moto) -> None:
    family, config = family_of_folder(large_model)
    model = load_model(large_model, progress=False)
    report = export_model(model, family, config, f"{s3.uri}/out", beside=large_model, register="far")

    assert report.folder == f"{s3.uri}/out"
    assert sum(is_part(each, 2) for each in moto.requests) == 1
    assert_equal(state_of(s3, "out"), load_file(large_model / "model.safetensors"))
    assert json.loads(cli("show", "far", "--json").stdout)["checkpoint"]["uri"] == report.folder


# --- use --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def far(cli: Cli, s3: Bucket, tmp_path: Path) -> str:
    """The address of a checkpoint in three shards, with a tokenizer."""
    folder = make(tmp_path / "far", shards=3)
    (folder / "tokenizer.json").write_text("{}")
    s3.upload(folder, "models/fär off")
    return f"{s3.uri}/models/fär off"


def test_a_folder(cli: Cli, far: str, s3: Bucket, moto: Moto, home: Path, tmp_path: Path) -> None:
    shown = json.loads(cli("index", far, "--json").stdout)
    assert (shown["uri"], shown["tensors"], [each["name"] for each in shown["shards"]]) == (far, 24, SHARDS)
    assert all("range" in each.headers for each in moto.gets(".safetensors"))  # only headers

    (tmp_path / "cards.yaml").write_text(f"name: far\nmodel_family: qwen\ncheckpoint: {far}/\n")
    cli("import", tmp_path / "cards.yaml")
    moto.requests.clear()
    pulled = json.loads(cli("pull", "far", "--json", "--no-progress").stdout)
    assert {each["name"] for each in pulled} == {
        *SHARDS, "config.json", "model.safetensors.index.json", "tokenizer.json",
    }  # fmt: skip
    weights = [each for each in moto.gets(".safetensors") if "range" not in each.headers]
    assert len(weights) == 3
    assert_equal(load_model("far", dtype="auto", progress=False).state_dict(), tied(tensors()))
    assert len(cli("path", "far").stdout.split()) == 3

    moto.requests.clear()
    cli("pull", "far", "--no-progress")
    assert all("range" in each.headers for each in moto.gets(".safetensors"))  # the headers again, no weights
    cli("verify", "far", "--no-progress")
    assert "far" in cli("du").stdout
    assert_no_secrets(home)

    cli("rm", "far", "--yes")
    assert "far" not in cli("du").stdout


def test_a_damaged_file_is_fetched_again(cli: Cli, far: str, moto: Moto) -> None:
    cli("pull", far, "--no-progress")
    path = Path(cli("path", far).stdout.split()[0])
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "mismatch" in cli("verify", far, "--no-progress", code=4).stdout
    moto.requests.clear()
    cli("verify", far, "--repair", "--no-progress")
    assert len(moto.gets(".safetensors")) == 1
    cli("verify", far, "--no-progress")


def tied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


def assert_no_secrets(home: Path) -> None:
    files = [path for path in home.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert not [secret for secret in (SECRET, "X-Amz-", KEY) if secret.encode() in path.read_bytes()], path


def test_offline(cli: Cli, far: str, moto: Moto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LADING_OFFLINE", "1")
    assert "LADING_OFFLINE" in cli("pull", far, code=5).stderr
    assert "LADING_OFFLINE" in cli("index", far, code=5).stderr
    assert moto.requests == []
    monkeypatch.setenv("LADING_OFFLINE", "")
    cli("pull", far, "--no-progress")
    moto.requests.clear()
    monkeypatch.setenv("LADING_OFFLINE", "1")
    cli("load", far, "--no-progress")
    cli("pull", far, "--no-progress")
    assert moto.requests == []


def test_one_file(cli: Cli, s3: Bucket, tmp_path: Path) -> None:
    folder = make(tmp_path / "far")
    (folder / "tokenizer.json").write_text("{}")
    s3.upload(folder, "one")
    uri = f"{s3.uri}/one/model.safetensors"
    # A bucket that cannot be listed is enough for it.
    pulled = json.loads(cli("pull", uri, "--include", "tokenizer.json", "--json", "--no-progress").stdout)
    assert {each["name"] for each in pulled} == {"model.safetensors", "tokenizer.json"}
    assert_equal(load_model(uri, dtype="auto", progress=False).state_dict(), tied(tensors()))
    assert "plain names" in cli("pull", uri, "--include", "*.json", code=2).stderr
    assert "no revisions" in cli("pull", uri, "--revision", "main", code=2).stderr


def test_an_index_of_shards(cli: Cli, far: str, moto: Moto) -> None:
    uri = f"{far}/model.safetensors.index.json"
    cli("pull", uri, "--no-progress")
    assert not [each for each in moto.requests if "list-type" in each.query]
    assert_equal(load_model(uri, dtype="auto", progress=False).state_dict(), tied(tensors()))


def test_a_checkpoint_inside(cli: Cli, s3: Bucket, tmp_path: Path) -> None:
    s3.upload(make(tmp_path / "far", shards=2), "runs/1/step 10")
    (tmp_path / "tokenizer.json").write_text("{}")
    s3.put("runs/1/tok/tokenizer.json", b"{}")
    torch.save(tensors(), tmp_path / "model.pt")
    s3.put("runs/2/model.pt", (tmp_path / "model.pt").read_bytes())
    with tarfile.open(tmp_path / "archive.tar", "w") as archive:
        archive.add(tmp_path / "model.pt", "run/model.pt")
    s3.put("runs/3.tar", (tmp_path / "archive.tar").read_bytes())
    (tmp_path / "cards.yaml").write_text(
        f"name: one\nmodel_family: qwen\ncheckpoint: {s3.uri}/runs/1\ncheckpoint_path: step 10\n"
        f"tokenizer: {s3.uri}/runs/1\ntokenizer_path: tok\n"
        f"---\nname: two\nbase: one\ncheckpoint: {s3.uri}/runs/2/model.pt\ncheckpoint_path: null\n{CARD_CONFIG}"
        f"---\nname: three\nbase: two\ncheckpoint: {s3.uri}/runs/3.tar\ncheckpoint_path: run/model.pt\n"
    )
    cli("import", tmp_path / "cards.yaml")
    for name in ("one", "two", "three"):
        pulled = json.loads(cli("pull", name, "--json", "--no-progress").stdout)
        assert any(each["name"].endswith("tokenizer.json") for each in pulled)
        assert_equal(load_model(name, dtype="auto", progress=False).state_dict(), tied(tensors()))


def test_an_adapter(cli: Cli, far: str, s3: Bucket, tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    here = write_adapter(tmp_path / "adapter", factors(module, 32, 32))
    s3.upload(here, "adapters/one")
    (tmp_path / "cards.yaml").write_text(
        f"name: there\nmodel_family: qwen\ncheckpoint: {far}\nadapter: {s3.uri}/adapters/one\n"
        f"---\nname: here\nbase: there\nadapter: {here}\n"
    )
    cli("import", tmp_path / "cards.yaml")
    assert "adapter: adapter_model.safetensors" in cli("pull", "there", "--no-progress").stdout
    expected = load_model("here", dtype="auto", progress=False).state_dict()
    assert_equal(load_model("there", dtype="auto", progress=False).state_dict(), expected)
    assert not torch.equal(expected[f"{module}.weight"], tensors()[f"{module}.weight"])


def test_a_change_under_a_name(cli: Cli, far: str, s3: Bucket, tmp_path: Path) -> None:
    cli("pull", far, "--no-progress")
    state = {name: tensor + 1 for name, tensor in tensors().items()}
    save_file(dict(list(state.items())[::3]), tmp_path / "shard", metadata={"format": "pt"})
    s3.put(f"models/fär off/{SHARDS[0]}", (tmp_path / "shard").read_bytes())
    cli("load", far, "--no-progress")  # the weights behind a name do not change on their own
    pulled = json.loads(cli("pull", far, "--json", "--no-progress").stdout)
    assert pulled[0]["fetched"]
    found = load_model(far, dtype="auto", progress=False).state_dict()
    assert all(torch.equal(found[name], state[name]) for name in list(state)[::3])


def test_wrong_keys(cli: Cli, far: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDOTHER")
    for words in (("index", far), ("pull", far), ("load", far), ("add", far), ("export", "tiny", f"{far}/x")):
        result = cli(*words, code=None)
        assert result.exit_code == (2 if words[0] == "export" else 7), result.output
        if words[0] != "export":
            assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in result.stderr
        assert SECRET not in result.output
        assert len(result.stderr.splitlines()) <= 2
    assert_no_secrets(home)


def test_an_import_without_the_package(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lading.sources.cloud.bucket.find_spec", lambda name: None)
    (tmp_path / "cards.yaml").write_text("name: far\nmodel_family: qwen\ncheckpoint: s3://bucket/far\n")
    assert "pip install 'lading-hub[cloud]'" in cli("import", tmp_path / "cards.yaml", code=3).stderr
    assert "pip install 'lading-hub[cloud]'" in cli("load", "s3://bucket/far", code=2).stderr


# --- another server, which checks signatures --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rclone_program() -> Path:
    program = find_rclone()
    if program is None:
        pytest.skip("rclone is not installed")
    return program


@pytest.fixture(scope="module")
def rclone(rclone_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URL of rclone's server, and the folder of its buckets."""
    folder = tmp_path_factory.mktemp("rclone")
    with rclone_server(rclone_program, folder) as url:
        yield url, folder


def test_there_and_back(
    cli: Cli, rclone: tuple[str, Path], large_model: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    url, folder = rclone
    (folder / "bucket").mkdir()
    use_s3(monkeypatch, url)
    cli("convert", large_model, "s3://bucket/ä b/large", "--no-progress")
    assert {path.name for path in (folder / "bucket" / "ä b" / "large").iterdir()} == {
        "model.safetensors",
        "config.json",
    }
    cli("index", "s3://bucket/ä b/large")
    streamed = load_model("s3://bucket/ä b/large", dtype="auto", stream=True, progress=False).state_dict()
    assert_equal(streamed, tied(load_file(large_model / "model.safetensors")))
    cli("pull", "s3://bucket/ä b/large", "--no-progress")
    found = load_model("s3://bucket/ä b/large", dtype="auto", progress=False).state_dict()
    assert_equal(found, tied(load_file(large_model / "model.safetensors")))
    assert_no_secrets(home)

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "SignatureDoesNotMatch" in cli("index", "s3://bucket/ä b/large", code=7).stderr


def test_a_peer_that_serves_its_cache(
    cli: Cli, template: Path, s3: Bucket, tmp_path: Path, rclone_program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/how-to/share-a-catalog.md: any static server over a cache is enough."""
    s3.upload(make(tmp_path / "far"), "far")
    cli("pull", f"{s3.uri}/far", "--no-progress")
    path = Path(cli("path", f"{s3.uri}/far").stdout.strip())
    cache = path.parents[2]
    # Another machine has another catalog and another cache.
    shutil.copy(template, tmp_path / "other.sqlite")
    with rclone_server(rclone_program, cache, "http") as url:
        (tmp_path / "cards.yaml").write_text(
            f"name: far\nmodel_family: qwen\ncheckpoint: {s3.uri}/far\n{CARD_CONFIG}"
            f"---\nname: far@elsewhere\ncheckpoint: {url}/{path.relative_to(cache)}\nsha256: {path.stem}\n"
        )
        monkeypatch.setenv("LADING_DATABASE_URL", f"sqlite:///{tmp_path / 'other.sqlite'}")
        monkeypatch.setenv("LADING_CACHE_DIR", str(tmp_path / "other"))
        cli("import", tmp_path / "cards.yaml")
        monkeypatch.setenv("LADING_ENV", "elsewhere")
        cli("pull", "far", "--no-progress")
        assert Path(cli("path", "far").stdout.strip()) == tmp_path / "other" / path.relative_to(cache)
        assert_equal(load_model("far", dtype="auto", progress=False).state_dict(), tied(tensors()))


@pytest.mark.few(1)
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_stream(
    cli: Cli, s3: Bucket, moto: Moto, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    use_gcs(monkeypatch, moto, s3)
    s3.upload(make(tmp_path / "far", shards=2), "far ü")
    uri = f"{scheme}://{s3.name}/far ü"
    found = load_model(uri, dtype="auto", stream=True, progress=False).state_dict()
    assert_equal(found, tied(tensors()))
    assert not list((home / "cache").rglob("*.safetensors"))
    assert "streamed" in cli("load", uri, "--stream", "--no-progress").stdout
    cli("pull", uri, "--no-progress")
    assert_equal(load_model(uri, dtype="auto", stream=True, progress=False).state_dict(), found)
    assert "streamed" not in cli("load", uri, "--stream", "--no-progress").stdout  # its files are here
    assert_no_secrets(home)
