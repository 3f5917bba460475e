from __future__ import annotations

from pathlib import Path

import pytest

from lading.system import filesystem
from lading.system.filesystem import host_id, place_id


def test_a_local_file_is_this_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_machine_id", lambda: "0" * 32)
    assert host_id() == "0" * 32
    assert place_id(tmp_path) == host_id()
    assert place_id(tmp_path / "not" / "yet") == host_id()


def test_without_a_machine_id_the_file_system_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_machine_id", lambda: None)
    found = place_id(tmp_path)
    assert found == place_id(tmp_path / "not" / "yet")
    assert found != host_id()
    assert found != place_id(Path("/proc"))
    monkeypatch.setattr(filesystem, "_file_system_id", lambda path: 0)
    assert place_id(tmp_path) == host_id()


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

    assert filesystem.own_place("~/x") == Path("/home/me/x")
    assert filesystem.own_place("~no-such-user/x") == filesystem.NO_HOME / "x"
    assert filesystem.own_place("x") == Path.cwd() / "x"


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
