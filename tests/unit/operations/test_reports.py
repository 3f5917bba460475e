"""The representations of reports: a short line that names numbers with their units."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest

from lading import (
    Adoption,
    CheckReport,
    DiffReport,
    DigestReport,
    DiskUsage,
    DiskUsageEntry,
    ExportReport,
    LoadPlan,
    LoadReport,
    Manifest,
    PullReport,
    Removal,
    VerifyReport,
)
from lading.catalog.records import Check, ImportReport
from lading.formats.manifest import Shard
from lading.operations.diff import Change
from lading.operations.plan import RankPlan
from lading.operations.plan_reads import Layout
from lading.operations.pull import PulledFile
from lading.system.filesystem import FileStat

MANIFEST = Manifest(
    format="safetensors",
    shards=(Shard(name="m.safetensors", size=4096),),
    names=("a", "b"),
    dtypes=("BF16", "F32"),
    shapes=((10, 100), (1000,)),
    shard_ids=array("I", [0, 0]),
    offsets=array("q", [0, 2000]),
)
STAT = FileStat(size=1, mtime_ns=1, ctime_ns=1, inode=1)
RANK = RankPlan(
    rank=1, pp=0, rdp=0, sdp=0, ep=0, tp=1, bytes_read=3_000_000, reads=1, files=1, memory={"F32": 2_000_000}
)  # fmt: skip
FILE = PulledFile(name="m.safetensors", size=5_000_000, path=None, fetched=True)
ENTRY = DiskUsageEntry(
    name="m", bytes=7_000_000, kind="cache", files=2, complete=False, verified=True, path="/m", checkpoint=None,
    revision=None,
)  # fmt: skip


def check(found: str) -> Check:
    return Check(file="f", path=Path("f"), stat=STAT, method="sha256", expected="aa", found=found)


REPORTS = [
    (LoadReport(
        name="qwen3_0.6b", family="qwen", model_class="Qwen", device="cpu", dtypes={"bfloat16": 596_000_000},
        parameters=596_000_000, tensors=310, shards=1, bytes_read=1_190_000_000, bytes_mapped=0, bytes_copied=0,
        reads=12, pages={}, phases={"read": 0.4, "build": 0.05},
    ),
     "<LoadReport: qwen3_0.6b as Qwen on cpu, 596M parameters, 1.19 GB read in 12 reads, 0.45 s>"),
    (CheckReport(
        family="qwen", problems=(), quantized={}, tensors=310, matched=309, tied={}, dropped=(), drawn=(),
        parameters=596_000_000, bytes=1_190_000_000, advice="",
    ),
     "<CheckReport: it fits qwen, 309 of 310 tensors needed, 596M parameters, 1.19 GB>"),
    (CheckReport(
        family="qwen", problems=("missing: x",) * 999, quantized={}, tensors=1, matched=0, tied={}, dropped=(),
        drawn=(), parameters=10, bytes=0, advice="Look.",
    ),
     "<CheckReport: 999 problems with qwen, 0 of 1 tensor needed, 10 parameters, 0 B>"),
    (RANK,
     "<RankPlan: rank 1, 3 MB read in 1 read, 2 MB of memory>"),
    (LoadPlan(
        name="m", family="qwen", sizes={"pp": 1, "rdp": 1, "sdp": 1, "ep": 1, "tp": 2}, checkpoint_bytes=6_000, files=1,
        adapter_bytes=0, ranks=(RANK,), manifest=MANIFEST,
        layout=Layout(ranks=2, tensors=(), kinds=array("q"), known=(), composed={}),
    ),
     "<LoadPlan: m, 6 kB in 1 file, 2 ranks, at most 2 MB of memory each>"),
    (PullReport(name="m", uri="hg://a/m", revision="0123abc", files=(FILE, FILE)),
     "<PullReport: m, revision 0123abc, 2 files of 10 MB, 2 of them not here before>"),
    (VerifyReport(name="m", uri="hg://a/m", checks=(check("aa"), check("bb"), check("aa"))),
     "<VerifyReport: m, 3 files, 2 match, 1 mismatch>"),
    (DigestReport(name="m", uri="hg://a/m", tensors={"a": "12", "b": "34"}, files={"f": "56"}, published="/d.json"),
     "<DigestReport: m, 1 file, 2 tensors, published by /d.json>"),
    (ExportReport(
        name="m", family="qwen", folder=Path("/out"), files={"a": 1_000, "b": 2_000}, tensors=3, parameters=1_500,
        dtypes={"bfloat16": 1_500}, dropped=("x",),
    ),
     "<ExportReport: m in /out, 3 tensors, 1.5K parameters, 3 kB in 2 files, 1 tensor dropped>"),
    (Adoption(path=Path("/m"), status="adopted", cards=("a", "b"), bytes=1_000, verified=True),
     "<Adoption: /m adopted, 1 kB, of a, b, verified>"),
    (Adoption(path=Path("/m"), status="failed", problem="It is damaged."),
     "<Adoption: /m failed, It is damaged.>"),
    (Removal(name="m", freed=4_000, removed=(Path("/m"),)),
     "<Removal: m, 4 kB in 1 file, 0 files kept>"),
    (ENTRY,
     "<DiskUsageEntry: m, 7 MB in 2 files, incomplete, /m>"),
    (DiskUsage(holdings=(ENTRY,), orphans=(), bytes=7_000_000, orphan_bytes=0),
     "<DiskUsage: 7 MB of 1 model, 0 B of 0 orphans>"),
    (DiffReport(changes=(Change(name="a", kind="shape", a=[1], b=[2]),), same=3, equal=1, not_compared=("b", "c")),
     "<DiffReport: 1 difference, 3 tensors of the same shape and dtype, 1 of equal values, 2 not compared>"),
    (ImportReport(added=("a", "b")),
     "<ImportReport: 2 added>"),
    (MANIFEST,
     "<Manifest: safetensors, 2 tensors, 2K parameters, 6 kB in 1 file>"),
]  # fmt: skip


@pytest.mark.parametrize(("report", "expected"), REPORTS, ids=[type(report).__name__ for report, _ in REPORTS])
def test_the_representation_of_a_report(report: object, expected: str) -> None:
    assert repr(report) == expected


def test_names_do_not_reach_the_terminal_as_they_are() -> None:
    assert repr(Removal(name="m\x1b[2J\n\u202e", freed=0, removed=())) == (
        "<Removal: m\\x1b[2J\\n\\u202e, 0 B in 0 files, 0 files kept>"
    )
