"""Places that models are exported to."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from lading.errors import AddressError, NotSupportedError
from lading.operations.destination import new_place, open_destination, place_of, require_new


def test_what_an_argument_means(tmp_path: Path) -> None:
    assert place_of("out") == place_of(Path("out")) == Path("out")
    assert place_of(f"file://{tmp_path}") == tmp_path
    assert place_of("s3://bucket/a/b/") == place_of("s3://bucket/a/b") == "s3://bucket/a/b"
    assert place_of("s3://bucket/model.bin") == "s3://bucket/model.bin/"  # a folder, in spite of its name
    assert place_of(Path("s3://bucket/a")) == Path("s3:/bucket/a")
    for other in ("hg://org/name", "https://host/folder", "ftp://host/x"):
        with pytest.raises(NotSupportedError, match="s3://bucket/folder"):
            place_of(other)
    for wrong in ("s3://", "s3://b", "s3://bucket/a//b", "s3://bucket/../x", "s3://bucket/x?X-Amz-Signature=s3cr3t"):
        with pytest.raises(AddressError) as error:
            place_of(wrong)
        assert "s3cr3t" not in str(error.value)


def test_a_folder(tmp_path: Path) -> None:
    with new_place(tmp_path / "out") as new, open_destination(new) as destination:
        for name in ("model.safetensors", "inside/a.json"):
            with destination.create(name, 3) as file:
                file.write(b"abc")
        assert destination.sizes() == {"inside/a.json": 3, "model.safetensors": 3}
        assert not (tmp_path / "out").exists()
        with pytest.raises(FileExistsError), destination.create("model.safetensors", 3):
            pass
    assert (tmp_path / "out" / "inside" / "a.json").read_bytes() == b"abc"
    with pytest.raises(FileExistsError):
        require_new(tmp_path / "out")


def test_a_file_that_the_disk_does_not_take_leaves_nothing_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with (
            pytest.raises(OSError, match="too large") as caught,
            new_place(tmp_path / "out") as new,
            open_destination(new) as destination,
            destination.create("model.safetensors", 1 << 20) as file,
        ):
            file.write(bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    # While the error is still held, with all that its frames hold.
    assert caught.value is not None
    opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert not [path for path in opened if path.startswith(str(tmp_path))]
    assert list(tmp_path.iterdir()) == []
