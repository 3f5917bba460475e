from __future__ import annotations

from pathlib import Path

import pytest

from lading.system import filesystem
from lading.system.filesystem import host_id, location_id


def test_a_local_file_is_this_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_machine_id", lambda: "0" * 32)
    assert host_id() == "0" * 32
    assert location_id(tmp_path) == host_id()
    assert location_id(tmp_path / "not" / "yet") == host_id()


def test_without_a_machine_id_the_file_system_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_machine_id", lambda: None)
    found = location_id(tmp_path)
    assert found == location_id(tmp_path / "not" / "yet")
    assert found != host_id()
    assert found != location_id(Path("/proc"))
    monkeypatch.setattr(filesystem, "_file_system_id", lambda path: 0)
    assert location_id(tmp_path) == host_id()


@pytest.mark.parametrize(("text", "known"), [("0123456789abcdef" * 2, True), ("uninitialized", False), ("", False)])
def test_what_is_a_machine_id(monkeypatch: pytest.MonkeyPatch, text: str, known: bool) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *args, **options: f"{text}\n")
    filesystem._machine_id.cache_clear()
    try:
        assert filesystem._machine_id() == (text if known else None)
    finally:
        filesystem._machine_id.cache_clear()


def test_no_place_is_in_a_folder_called_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")

    assert filesystem.storage_path("~/x") == Path("/home/me/x")
    assert filesystem.storage_path("~no-such-user/x") == filesystem.NO_HOME / "x"
    assert filesystem.storage_path("x") == Path.cwd() / "x"


def test_a_network_file_is_the_same_from_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_mount", lambda path: ("nfs4", "server:/models"))
    assert location_id(tmp_path) == "nfs4:server:/models"


def test_an_unknown_home_stays_in_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")

    assert filesystem.expand_home("~/x") == Path("/home/me/x")
    assert filesystem.expand_home("~no-such-user/x") == Path("~no-such-user/x")


def test_what_one_may_not_look_at_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert filesystem.path_exists(tmp_path / "file")
    assert not filesystem.path_exists(tmp_path / "other")
    assert not filesystem.path_exists(f"{tmp_path}/file/below")
    assert not filesystem.path_exists("a\0b")
    assert not filesystem.path_exists(tmp_path / ("x" * 300))  # which no file system has names for
