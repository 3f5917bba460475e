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


def test_a_home_that_nobody_has_stays_in_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")

    assert filesystem.expand_home("~/x") == Path("/home/me/x")
    assert filesystem.expand_home("~no-such-user/x") == Path("~no-such-user/x")


def test_what_one_may_not_look_at_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert filesystem.is_there(tmp_path / "file")
    assert not filesystem.is_there(tmp_path / "other")
    assert not filesystem.is_there(f"{tmp_path}/file/below")
    assert not filesystem.is_there("a\0b")
    assert not filesystem.is_there(tmp_path / ("x" * 300))  # which no file system has names for
