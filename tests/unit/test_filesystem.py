from __future__ import annotations

from pathlib import Path

import pytest

from lading import filesystem
from lading.filesystem import host_id, place_id


def test_a_local_file_is_this_machines(tmp_path: Path) -> None:
    assert place_id(tmp_path) == host_id()
    assert place_id(tmp_path / "not" / "yet") == host_id()


def test_a_network_file_is_the_same_from_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_mount", lambda path: ("nfs4", "server:/models"))
    assert place_id(tmp_path) == "nfs4:server:/models"
