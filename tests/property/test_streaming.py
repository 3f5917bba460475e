"""What is read from a source by requests is what is read from files, whatever the sizes of requests and buffers."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lading.formats.digests import default_dims
from lading.formats.manifest import Manifest
from lading.planning import plan as planning
from lading.planning.box import Box
from lading.planning.plan import Wanted, plan
from lading.sources.source import RemoteFile, Snapshot
from lading.transfer import reader, requests
from lading.transfer.execute import execute
from lading.transfer.files import ShardFile
from lading.transfer.hashing import Hasher
from lading.transfer.stream import FileDigest, Stream, StreamedFile
from tests.helpers.examples import examples
from tests.helpers.transfer_cases import manifests, wanted_of
from tests.property.test_cooperative import same, shapes_of, write
from tests.unit.transfer.test_execute import SlowDevice, checkpoint


@st.composite
def cases(draw: st.DrawFn) -> tuple[Manifest, Wanted]:
    """Some bytes may be wanted twice, for places and dtypes of their own."""
    manifest = draw(manifests())
    both = [draw(wanted_of(manifest)) for _ in range(2)]
    columns = {name: [*getattr(both[0], name), *getattr(both[1], name)] for name in ("tensors", "boxes", "dtypes")}
    return manifest, Wanted(**columns)


class Files:
    """A source of files that are on this machine, which counts its bytes."""

    def __init__(self, files: list[ShardFile]) -> None:
        self.data = {file.path.name: file.path.read_bytes() for file in files}
        self.read_of: list[tuple[str, int, int]] = []
        """(file, offset, bytes) of each request."""

    def read(self, snapshot: Snapshot, file: RemoteFile, offset: int, into: memoryview) -> None:
        assert offset + len(into) <= len(self.data[file.name])
        into[:] = self.data[file.name][offset : offset + len(into)]
        self.read_of.append((file.name, offset, len(into)))

    def close(self) -> None:
        pass


@contextmanager
def sizes(window: int, gap: int, chunk: int) -> Iterator[None]:
    """Have a checkpoint of some hundred bytes be read by many requests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WINDOW", window), ("GAP", gap), ("_STEP", 2 * window)):
            patch.setattr(requests, name, value)
        for name in ("CAST_CHUNK", "ROWS_CHUNK"):
            patch.setattr(requests, name, chunk)
        patch.setattr(reader, "PAGE", 1)
        yield


def bytes_of(manifest: Manifest, files: list[ShardFile], source: Files, ranks: int = 1) -> list[StreamedFile]:
    stream = Stream(source, Snapshot(uri="", revision="", files=()), ranks=ranks)  # type: ignore[arg-type]
    return [
        StreamedFile(stream=stream, file=RemoteFile(name=file.path.name, size=shard.size))
        for file, shard in zip(files, manifest.shards, strict=True)
    ]


@settings(max_examples=examples(100))
@given(
    cases(), st.sampled_from([8, 64, 1000]), st.sampled_from([0, 5, 1000]), st.sampled_from([8, 1000]),
    st.booleans(), st.booleans(), st.sampled_from([1, 8, 256 << 10]),
)  # fmt: skip
def test_a_stream_equals_a_read(
    case: tuple[Manifest, Wanted], window: int, gap: int, chunk: int, whole: bool, hashed: bool, long_run: int
) -> None:
    manifest, wanted = case
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "LONG_RUN", long_run)
        files = write(manifest, Path(folder))
        source = Files(files)
        streamed = bytes_of(manifest, files, source)
        planned, shapes = plan(manifest, wanted), shapes_of(wanted)
        sha256 = {each.file.name: FileDigest(each.file.size or 0) for each in streamed} if whole else {}
        seen, expected = (Hasher(manifest, default_dims(manifest), planned, wanted) for _ in range(2))
        with sizes(window, gap, chunk), streamed[0].stream.hashing(sha256):
            found = execute(planned, streamed, shapes, observer=seen if hashed else None)
        there = execute(planned, files, shapes, observer=expected)

        assert all(map(same, found, there))
        if hashed:
            assert seen.digests() == expected.digests()
        for i in {*planned.shards, *planned.rows.shards} if whole else ():
            name = streamed[i].file.name
            assert sha256[name].hexdigest() == hashlib.sha256(source.data[name]).hexdigest()
    assert streamed[0].stream.bytes_read == sum(size for _, _, size in source.read_of)
    assert streamed[0].stream.requests == len(source.read_of)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_stream_to_a_device(tmp_path: Path, dtype: str) -> None:
    """No buffer is filled again, and no bytes in it are moved over others, before its copies have passed."""
    manifest, file = checkpoint(
        tmp_path, [("BF16", (512, 96)), ("BF16", (7,)), ("BF16", (400, 128)), ("BF16", (64, 96))]
    )
    boxes = [Box((0, 8), (512, 40)), Box((0,), (7,)), Box((0, 0), (400, 128)), Box((0, 48), (64, 48))]
    wanted = Wanted(tensors=range(4), boxes=boxes, dtypes=[dtype] * 4)
    planned = plan(manifest, wanted)
    device, source = SlowDevice(planned.arena_bytes), Files([file])
    with sizes(window=16 << 10, gap=1 << 10, chunk=1 << 10):
        found = execute(planned, bytes_of(manifest, [file], source), shapes_of(wanted), arena=device)
    device.jobs.put(None)
    assert all(map(same, found, execute(planned, [file], shapes_of(wanted))))
    assert len(source.read_of) > 10


def test_bytes_that_are_wanted_twice_are_moved_after_both_have_them(tmp_path: Path) -> None:
    manifest, file = checkpoint(tmp_path, [("BF16", (64, 96))])
    boxes = [Box((0, 0), (64, 40)), Box((0, 20), (64, 50)), Box((0, 70), (64, 20))]
    for dtype in ("F32", "BF16"):
        wanted = Wanted(tensors=[0] * 3, boxes=boxes, dtypes=[dtype] * 3)
        planned = plan(manifest, wanted)
        found = execute(planned, bytes_of(manifest, [file], Files([file])), shapes_of(wanted))
        assert all(map(same, found, execute(planned, [file], shapes_of(wanted))))


def test_a_gap_is_read_where_it_costs_less_than_a_request(tmp_path: Path) -> None:
    """Whole rows for a few of their columns, and a small tensor with its neighbor; nothing twice."""
    manifest, file = checkpoint(tmp_path, [("F32", (600, 3000)), ("F32", (64,)), ("F32", (2000, 600)), ("F32", (5,))])
    boxes = [Box((0, 0), (600, 750)), Box((0,), (16,)), Box((0, 0), (500, 600)), Box((0,), (5,))]
    wanted = Wanted(tensors=range(4), boxes=boxes, dtypes=["F32"] * 4)
    source = Files([file])
    tensors = execute(plan(manifest, wanted), bytes_of(manifest, [file], source), shapes_of(wanted))

    assert all(map(same, tensors, execute(plan(manifest, wanted), [file], shapes_of(wanted))))
    assert sum(size for _, _, size in source.read_of) <= 600 * 3000 * 4 + 500 * 600 * 4 + requests.GAP
    assert len(source.read_of) <= 5
