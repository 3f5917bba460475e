from __future__ import annotations

from pathlib import Path

import pytest

from lading.errors import SettingsError
from lading.system.filesystem import file_system_type, host_id, on_network
from lading.system.settings import Settings


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))

    settings = Settings.from_environment({})
    assert settings.database_url == f"sqlite:///{tmp_path}/XDG_DATA_HOME/lading/catalog.sqlite"
    assert settings.cache_dir == tmp_path / "XDG_CACHE_HOME" / "lading"
    assert settings.card_paths == (tmp_path / "XDG_CONFIG_HOME" / "lading" / "cards",)
    assert settings.env is None
    assert not settings.offline

    settings = Settings.from_environment(
        {
            "LADING_DATABASE_URL": "sqlite:////elsewhere.sqlite",
            "LADING_CACHE_DIR": "/cache",
            "LADING_CARDS": "/a:/b.yaml: ",
            "LADING_ENV": "cluster",
            "HF_HUB_OFFLINE": "1",
        }
    )
    assert settings.database_url == "sqlite:////elsewhere.sqlite"
    assert settings.cache_dir == Path("/cache")
    assert settings.card_paths[1:] == (Path("/a"), Path("/b.yaml"))
    assert settings.env == "cluster"
    assert settings.offline


@pytest.mark.parametrize("word", ["1", "true", "yes", "on", "y", "0", "false", "no", "off", "n", "", " "])
def test_what_says_that_there_is_no_network(word: str) -> None:
    for text in (word, word.upper(), f" {word.title()} "):
        offline = Settings.from_environment({"LADING_OFFLINE": text}).offline
        assert offline == (word in {"1", "true", "yes", "on", "y"})


@pytest.mark.parametrize("text", ["2", "ja", "offline", "tru", "1 1"])
def test_what_says_neither_yes_nor_no(text: str) -> None:
    with pytest.raises(SettingsError, match=f"LADING_OFFLINE is expected to be one of 1, true.*'{text}'"):
        Settings.from_environment({"LADING_OFFLINE": text})


@pytest.mark.parametrize("word", ["auto", "always", "never", ""])
def test_pages_are_chosen_by_the_environment(word: str) -> None:
    for text in (word, word.upper(), f" {word} "):
        assert Settings.from_environment({"LADING_HUGE_PAGES": text}).huge_pages == (word or "auto")


@pytest.mark.parametrize("text", ["1", "sometimes", "madvise"])
def test_an_unknown_choice_of_pages_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=f"LADING_HUGE_PAGES is expected to be auto, always or never.*'{text}'"):
        Settings.from_environment({"LADING_HUGE_PAGES": text})


@pytest.mark.parametrize("text", ["1", "on", "Yes", "TRUE", "y", "0", "off", "no", "", "2", " 1"])
def test_the_hub_s_variable_means_what_it_means_there(text: str) -> None:
    from huggingface_hub.constants import _is_true

    assert Settings.from_environment({"HF_HUB_OFFLINE": text}).offline == _is_true(text)
    assert Settings.from_environment({"HF_HUB_OFFLINE": text, "LADING_OFFLINE": "yes"}).offline


def test_settings_are_equal_and_hash_by_value() -> None:
    assert {Settings.from_environment({}), Settings.from_environment({})} == {Settings.from_environment({})}


def test_the_file_system_of_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    assert file_system_type(tmp_path / "not" / "yet") == file_system_type(tmp_path)
    assert file_system_type(Path("/proc/self")) == "proc"
    assert not on_network(tmp_path)


def test_the_host_has_a_lasting_name() -> None:
    assert host_id()
    assert host_id() == host_id()
