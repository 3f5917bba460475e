"""The view of what is on this machine without a card, in each kind of database."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lading.catalog.artifacts import known_artifacts, record_artifacts
from lading.catalog.checkpoints.record import record_checkpoint
from lading.catalog.import_cards import import_files
from lading.catalog.open import open_catalog
from lading.catalog.query import run_query
from lading.catalog.records import CheckpointContents, FoundArtifact
from lading.catalog.store import AssetStore
from lading.formats.artifacts import Artifact
from lading.system.uris import path_uri
from tests.helpers.catalog_tools import card_file, make_copies, make_manifest, settings_in, without_seeds

GGUF = Artifact(kind="gguf", files=2, bytes=1 << 40, tensors=3, reason="it is 100% of another format")
AWQ = Artifact(kind="quantized (awq)", files=2, bytes=7, tensors=3, dtypes=("I32",), reason="it is quantized")
LORA = Artifact(kind="lora adapter", files=1, bytes=5, dtypes=("F16", "F32"), reason="it is for a card")


@pytest.mark.usefixtures("any_database")
def test_what_has_no_card(tmp_path: Path) -> None:
    with without_seeds():
        database = open_catalog(settings_in(tmp_path))
    store = AssetStore(database)
    manifest = make_manifest()
    for name in ("mine", "carded", "fetched", "adapter", "a%b", "awq"):
        folder = tmp_path / name
        folder.mkdir()
        for shard in manifest.shards:
            (folder / shard.name).touch()
        uri = path_uri(folder) + ("/adapter_model.safetensors" if name == "adapter" else "")
        copies = [replace(c, kind="cache" if name == "fetched" else "adopted") for c in make_copies(manifest, folder)]
        record_checkpoint(database, CheckpointContents(uri=uri, manifest=manifest, copies=copies))
    record_checkpoint(database, CheckpointContents(uri="hg://a/remote", manifest=manifest))
    import_files(database, [card_file(f"name: card\nmodel_family: qwen\ncheckpoint: {tmp_path / 'carded'}\n")])
    artifacts = {"carded": LORA, "gone": GGUF, "mine": GGUF, "awq": AWQ}
    found = [FoundArtifact(path=tmp_path / name, artifact=artifact) for name, artifact in artifacts.items()]
    record_artifacts(database, found)

    models = store.models(unregistered=True)

    # Databases differ in the order of letters.
    assert sorted((m.name.removeprefix(f"{tmp_path}/"), m.kind or "", m.status) for m in models) == [
        ("a%b", "checkpoint", "unregistered"), ("awq", "quantized (awq)", "unloadable"), ("card", "", "ready"),
        ("carded", "lora adapter", "unregistered"), ("mine", "checkpoint", "unregistered"),
        ("mine", "gguf", "unloadable"),
    ]  # fmt: skip
    assert [m.kind for m in store.models(unregistered=True, sort="size", limit=1)] == ["gguf"]
    assert [m.kind for m in store.models(unregistered=True, dtype="fp16")] == ["lora adapter"]
    assert [m.kind for m in store.models(unregistered=True, max_bytes=5)] == ["lora adapter"]
    assert [m.problem for m in store.models(unregistered=True, status="unloadable")] == [AWQ.reason, GGUF.reason]
    assert store.models(f"{tmp_path}/mine", unregistered=True, local=True, sort="modified") != []
    assert {m.name for m in store.models(include_all=True)} == {"card"}
    assert known_artifacts(database) == [found[3], found[0], found[2]], "the other one is gone"
    assert run_query(database, "SELECT count(*) FROM unregistered").rows == [(6,)]

    record_artifacts(database, found[2:3], searched=[tmp_path])

    assert run_query(database, "SELECT kind, tensors FROM artifacts").rows == [("gguf", 3)]
