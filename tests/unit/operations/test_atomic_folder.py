"""A folder that is there as a whole or not at all, also where its process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lading.operations.atomic_folder import atomic_folder


def test_it_comes_all_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("1")
        assert not folder.exists()
        assert temporary.parent == folder.parent
    assert (folder / "a").read_text() == "1"
    assert [p.name for p in folder.parent.iterdir()] == ["out"]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "a").write_text("1")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_gives_way(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").touch()
    assert (tmp_path / "real" / "a").exists()


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    (tmp_path / "file").touch()
    for name in ("out", "file"):
        with pytest.raises(FileExistsError), atomic_folder(tmp_path / name):
            pass

    def be_late() -> None:
        with atomic_folder(tmp_path / "late") as temporary:
            (temporary / "a").touch()
            (tmp_path / "late").mkdir()
            (tmp_path / "late" / "theirs").touch()

    with pytest.raises(FileExistsError):
        be_late()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "file", "late"}
    assert [p.name for p in (tmp_path / "late").iterdir()] == ["theirs"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom lading.operations.atomic_folder import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').touch()\n    print(flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with atomic_folder(tmp_path / "out") as temporary:  # the other one is at work: it stays
            assert len(list(tmp_path.iterdir())) == 2
            (temporary / "a").touch()
        process.send_signal(signal.SIGKILL)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a"}
    (tmp_path / "out" / "a").unlink()
    assert len(list(tmp_path.iterdir())) == 2

    with atomic_folder(tmp_path / "out"):
        assert len(list(tmp_path.iterdir())) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_error_for_a_full_disk_names_the_folder(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "out"), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "out")
    assert not any(tmp_path.iterdir())
