"""Checkpoints of a web server: published again under their address, and at addresses without a suffix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from click.testing import Result
from safetensors.torch import load, load_file, save_file

import lading
from lading.errors import DigestMismatchError, FetchError
from tests.helpers.make_checkpoint import make, qwen_card, tensors
from tests.servers.hostile import Exchange, honest, serve

Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def _online(catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LADING_OFFLINE", "0")
    monkeypatch.setenv("LADING_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def files_of(folder: Path) -> dict[str, bytes]:
    return {f"/m/{path.name}": path.read_bytes() for path in folder.iterdir()}


def trained_further(folder: Path) -> None:
    """Give every tensor other values, and leave names, shapes and sizes as they are."""
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    for path in folder.glob("*.pt"):
        torch.save({name: tensor + 1 for name, tensor in torch.load(path).items()}, path)


def weakly(exchange: Exchange) -> None:
    """Send a validator that is weak: other bytes may have the same."""
    about = exchange.about
    exchange.about = lambda: {**about(), "ETag": 'W/"1"'}  # type: ignore[method-assign]
    honest(exchange)


def loaded() -> float:
    return lading.load_model("web", dtype=torch.float32, progress=False).state_dict()["model.norm.weight"][0].item()


@pytest.mark.few(2)
@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json", "model.pt"])
@pytest.mark.parametrize(
    "kind", ["etag", "nothing", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("date", "digest", "weak"))]
)
def test_what_is_published_again_is_pulled(cli: Cli, tmp_path: Path, kind: str, file: str) -> None:
    folder = make(tmp_path / "m", shards=2 if "index" in file else 1)
    torch.save(tensors(), folder / "model.pt")
    with serve(
        files_of(folder),
        weakly if kind == "weak" else honest,
        etags=kind == "etag",
        old=kind == "date",
        digests=kind == "digest",
    ) as server:
        (tmp_path / "cards.yaml").write_text(qwen_card("web", server.url(f"/m/{file}")))
        cli("import", tmp_path / "cards.yaml")
        cli("pull", "web", "--no-progress")
        before = loaded()

        # Nothing new: what can be known to be the same is not fetched again.
        server.requests.clear()
        report = json.loads(cli("pull", "web", "--no-progress", "--json").stdout)
        weights = [row for row in report if "config" not in row["name"] and "index" not in row["name"]]
        same = kind in ("etag", "date", "digest")
        assert {row["fetched"] for row in weights} == ({False} if same else {True}) or file == "model.pt"
        large = [h for _, path, h in server.requests if path.endswith((".safetensors", ".pt")) and "range" not in h]
        assert same or large

        trained_further(folder)
        server.files = files_of(folder)
        if kind == "date":
            server.modified = "Fri, 01 Jan 2021 00:00:00 GMT"
        assert loaded() == before  # a load sends no request
        cli("pull", "web", "--no-progress")
        assert loaded() == pytest.approx(before + 1, abs=0.05)
        assert "mismatch" not in cli("verify", "web", "--no-progress").stdout


@pytest.mark.slow
def test_what_is_published_again_is_pulled_after_an_index_of_it(cli: Cli, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    with serve(files_of(folder)) as server:
        (tmp_path / "cards.yaml").write_text(qwen_card("web", server.url("/m/model.safetensors")))
        cli("import", tmp_path / "cards.yaml")
        cli("pull", "web", "--no-progress")
        before = loaded()
        trained_further(folder)
        server.files = files_of(folder)
        cli("index", "web")
        cli("pull", "web", "--no-progress")
        assert loaded() == pytest.approx(before + 1, abs=0.05)
        cli("rm", "web")
        cli("pull", "web", "--no-progress")
        assert loaded() == pytest.approx(before + 1, abs=0.05)


@pytest.mark.parametrize("kind", ["etag", "date", "digest"])
def test_a_load_refuses_what_took_the_place_of_the_indexed_file(cli: Cli, tmp_path: Path, kind: str) -> None:
    folder = make(tmp_path / "m")
    with serve(files_of(folder), etags=kind == "etag", old=kind == "date", digests=kind == "digest") as server:
        (tmp_path / "cards.yaml").write_text(qwen_card("web", server.url("/m/model.safetensors")))
        cli("import", tmp_path / "cards.yaml")
        cli("index", "web")
        trained_further(folder)
        server.files = files_of(folder)
        if kind == "date":
            server.modified = "Fri, 01 Jan 2021 00:00:00 GMT"
        for _ in range(2):
            with pytest.raises(DigestMismatchError if kind == "digest" else FetchError) as raised:
                loaded()
            assert kind == "digest" or "`lading pull` fetches what is published now" in str(raised.value)

        cli("pull", "web", "--no-progress")
        expected = load_file(folder / "model.safetensors")["model.norm.weight"][0].float().item()
        assert loaded() == expected


def test_a_load_accepts_the_indexed_file_from_a_server_without_validators(cli: Cli, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    with serve(files_of(folder)) as server:
        (tmp_path / "cards.yaml").write_text(qwen_card("web", server.url("/m/model.safetensors")))
        cli("import", tmp_path / "cards.yaml")
        cli("index", "web")
        server.etags = False  # it was moved behind another server
        before = loaded()
        cli("rm", "web")
        server.etags = True
        assert loaded() == before


@pytest.mark.few(1)
@pytest.mark.parametrize("path", ["/api/models/12345", "/m/weights", "/m/model.v2"])
def test_an_address_without_a_known_suffix(cli: Cli, tmp_path: Path, path: str) -> None:
    data = (make(tmp_path / "m") / "model.safetensors").read_bytes()
    with serve({path: data}) as server:
        (tmp_path / "cards.yaml").write_text(qwen_card("web", server.url(path)))
        cli("import", tmp_path / "cards.yaml")
        assert cli("check", "web").stdout.startswith("ok")
        cli("pull", "web", "--no-progress")
        model = lading.load_model("web", dtype="auto", progress=False)
        assert _equal(model.state_dict(), load(data))
        assert "match" in cli("verify", "web", "--no-progress").stdout
        assert Path(cli("path", "web").stdout.strip()).read_bytes() == data
        cli("rm", "web")


@pytest.mark.few(2)
@pytest.mark.parametrize("data", [b"", b"no checkpoint", b"\0" * 1000, b"<html>"])
def test_what_is_no_checkpoint_at_an_address_without_a_suffix(cli: Cli, tmp_path: Path, data: bytes) -> None:
    with serve({"/12345": data}) as server:
        (tmp_path / "cards.yaml").write_text(qwen_card("web", server.url("/12345")))
        cli("import", tmp_path / "cards.yaml")
        for words in (("pull", "web"), ("load", "web"), ("index", "web"), ("check", "web")):
            done = cli(*words, code=None)
            assert done.exit_code in (2, 4, 5), done.output
            assert "a bug in lading" not in done.output


def test_what_is_secret_in_an_address_is_in_no_message(cli: Cli, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    with serve(files_of(folder)) as server:
        texts = []
        for path in ("/m/model.safetensors", "/m/gone.safetensors", "/m/gone.pt", "/m/config.json", "/m/a.gguf"):
            uri = server.url(f"{path}?token=s3cret")
            (tmp_path / "cards.yaml").write_text(qwen_card("web", uri))
            cli("import", "--replace", tmp_path / "cards.yaml")
            for words in (
                ("pull", "web", "--dry-run"), ("pull", "web", "--revision", "main"), ("path", "web"),
                ("pull", "web", "--include", "*"), ("index", "web"), ("check", "web"), ("pull", "web"),
            ):  # fmt: skip
                texts.append(cli(*words, code=None).stderr)
        for name in ("hg://a/b?token=s3cret", "hg://a/b@x y?token=s3cret"):
            texts.append(cli("index", name, code=None).output)
    assert "s3cret" not in "".join(texts)
    assert "/m/gone.pt" in "".join(texts)


def _equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tokenizer_in_a_zip_archive(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = Path(__file__).parents[1] / "parity" / "fairseq2_tokenizers" / "speech.model"
    with ZipFile(tmp_path / "vocab.zip", "w", ZIP_DEFLATED) as archive:
        archive.write(words, "spm_char.model")
    with serve({"/s2t/vocab.zip": (tmp_path / "vocab.zip").read_bytes()}) as server:
        (tmp_path / "cards.yaml").write_text(
            f"name: speech\ntokenizer: {server.url('/s2t/vocab.zip')}\ntokenizer_path: spm_char.model\n"
            "tokenizer_family: s2t_transformer\ntokenizer_config: {target_langs: [de, fr], default_target_lang: de}\n"
        )
        cli("import", tmp_path / "cards.yaml")
        encoder = lading.load_tokenizer("speech", progress=False).create_encoder(lang="fr")
    assert encoder.encode_as_tokens("") == ["</s>", "<lang:fr>"]

    monkeypatch.setenv("LADING_OFFLINE", "1")
    offline = lading.load_tokenizer("speech")
    assert offline.encode("").tolist() == [offline.vocab_info.eos_idx, offline.model.piece_to_id("<lang:de>")]
