"""Repositories in a Hugging Face cache, laid out as huggingface_hub does it, without a hub; and cards of them."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import lading
from tests.helpers.make_checkpoint import CARD_CONFIG, qwen_card
from tests.servers.hub import LFS, git_blob

CONFIG = f"model_family: qwen\n{CARD_CONFIG}"


def add_cards(folder: Path, **checkpoints: str) -> None:
    """A card for each name; ``checkpoints`` are the URIs, and may go on with further lines."""
    text = "---\n".join(qwen_card(name, uri) for name, uri in checkpoints.items())
    path = folder / "cards.yaml"
    path.write_text(text)
    lading.import_cards(path, replace=True)


def use_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make ``folder`` the cache of this process and of those that it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def add_snapshot(
    cache: Path, repo: str, files: Path | Mapping[str, bytes], *, ref: str | None = "main", commit: str | None = None
) -> Path:
    """Put a commit of a repository into the cache; returns the folder of the snapshot."""
    if isinstance(files, Path):
        folder = files
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    commit = commit or hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    (home / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True, exist_ok=True)
    if ref is not None:
        path = home / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)

    for name, data in files.items():
        tag = hashlib.sha256(data).hexdigest() if name.endswith(LFS) else git_blob(data)
        blob = home / "blobs" / tag
        blob.write_bytes(data)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(blob, link.parent))

    return snapshot


def tree(folder: Path) -> dict[str, str]:
    """All that is in a folder: the content of files, the target of links."""
    return {
        p.relative_to(folder).as_posix(): f"-> {p.readlink()}"
        if p.is_symlink()
        else hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else "folder"
        for p in sorted(folder.rglob("*"))
    }
