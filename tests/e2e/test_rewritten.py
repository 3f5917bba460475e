"""What is rewritten of a file that is elsewhere is a file of its own: with a digest, a state and a fate of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lading
from lading.catalog.store import get_asset_store
from lading.formats import rewritten_files
from lading.system.settings import Settings
from tests.helpers.cached_repository import add_cards
from tests.helpers.make_checkpoint import tensors
from tests.servers.hostile import serve


@pytest.fixture
def published(tmp_path: Path, catalog: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cards of a file on a server whose matrices do not lie row after row."""
    monkeypatch.delenv("LADING_OFFLINE", raising=False)
    path = tmp_path / "model.pt"
    torch.save({name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in tensors().items()}, path)
    with serve({"/model.pt": path.read_bytes(), "/again.pt": path.read_bytes()}) as server:
        add_cards(tmp_path, far=server.url("/model.pt"), again=server.url("/again.pt"))
        yield


def load(name: str = "far", **kwargs: object) -> dict[str, torch.Tensor]:
    return lading.load_model(name, dtype="auto", progress=False, **kwargs).state_dict()  # type: ignore[arg-type]


def made() -> Path:
    (path,) = rewritten_files(Settings.from_environment().cache_dir)
    return path


def test_the_digest_of_the_original_is_not_that_of_what_was_made_of_it(published: None) -> None:
    load()

    assert lading.query("SELECT name, sha256 FROM shards").rows == [("model.pt", None)]
    assert lading.verify_model("far", progress=False).good
    load(verify="always")

    ((sha256, path),) = lading.query("SELECT found, path FROM verifications WHERE method = 'sha256'").rows
    assert "/blobs/" in str(path)
    assert get_asset_store().find_content(str(sha256)) is None, "a file of other bytes has this digest"


def test_a_rewritten_file_that_changed_is_rewritten_again(published: None) -> None:
    expected = {name: tensor.clone() for name, tensor in load().items()}
    path = made()
    data = path.read_bytes()
    os.chmod(path, 0o644)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 0x3F]))

    found = load()

    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert made().read_bytes() == data


def test_what_is_known_to_be_good_is_made_once(published: None) -> None:
    load()
    state = made().stat()

    load("again")

    assert made().stat() == state
