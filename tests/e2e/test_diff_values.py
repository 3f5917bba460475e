"""`lading diff --values`: the values of two checkpoints, against torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lading
from lading.errors import CheckpointNotFoundError, NotSupportedError
from lading.operations.diff import DiffReport
from tests.e2e.test_cli_compare import REMOTE, set_digests
from tests.helpers.make_checkpoint import make, tensors

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]


def save(path: Path, state: dict[str, torch.Tensor], form: str = "safetensors", shards: int = 1) -> Path:
    """Write a checkpoint, and return what to call it by."""
    path.mkdir(parents=True)
    if form == "pt":
        torch.save(state, path / "model.pt")
        return path / "model.pt"
    if shards == 1:
        save_file(state, path / "model.safetensors")
        return path

    names = list(state)
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))

    return path


def compared(tmp_path: Path, a: torch.Tensor, b: torch.Tensor) -> DiffReport:
    paths = [save(tmp_path / name, {"w": tensor}) for name, tensor in (("a", a), ("b", b))]

    return lading.diff_models(*paths, values=True)


def plain(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float, float]:
    """Compare two tensors one element at a time, with the numbers of Python."""
    changed, max_abs, max_rel = 0, 0.0, 0.0
    for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
        if x == y or (x != x and y != y):
            continue
        changed += 1
        apart = abs(x - y)
        if not math.isfinite(apart):
            max_abs = max_rel = math.inf
            continue
        max_abs = max(max_abs, apart)
        max_rel = max(max_rel, apart / max(abs(x), abs(y)))

    return changed, max_abs, max_rel


def bits(dtype: torch.dtype, count: int) -> st.SearchStrategy[torch.Tensor]:
    """Return tensors of any bits, so of NaN, infinities and subnormal numbers, too."""
    size = count * dtype.itemsize
    if dtype == torch.bool:
        return st.lists(st.booleans(), min_size=count, max_size=count).map(torch.tensor)

    return st.binary(min_size=size, max_size=size).map(
        lambda data: torch.frombuffer(bytearray(data), dtype=torch.uint8).clone().view(dtype)
    )


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two tensors of one dtype and shape; some elements are the same."""
    dtype = draw(st.sampled_from([*FLOATS, *INTEGERS, *UNSIGNED]))
    count = draw(st.integers(1, 12))
    a, b = draw(bits(dtype, count)), draw(bits(dtype, count))
    for i in draw(st.sets(st.integers(0, count - 1))):
        b.view(torch.uint8)[i * dtype.itemsize : (i + 1) * dtype.itemsize] = a.view(torch.uint8)[
            i * dtype.itemsize : (i + 1) * dtype.itemsize
        ]

    return a, b


class TestAgainstPlainArithmetic:
    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(pair=pairs())
    def test_any_bits(self, tmp_path_factory, pair):
        a, b = pair
        report = compared(tmp_path_factory.mktemp("pair"), a, b)
        changed, max_abs, max_rel = plain(a, b)

        found = report.values["w"]
        assert (found.changed, found.elements) == (changed, a.numel())
        assert found.equal == (changed == 0) == (not report.changes)
        assert [c.kind for c in report.changes] == ["values"] * (changed > 0)
        if not a.is_floating_point():
            assert found.max_abs == max_abs
            assert isinstance(found.max_abs, int)
        # In single precision, a difference has one rounding.
        assert found.max_abs == pytest.approx(max_abs, rel=1e-6, abs=0)
        assert found.max_rel == pytest.approx(max_rel, rel=1e-6, abs=1e-37)

    @pytest.mark.few(2)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int16, torch.complex64])
    def test_a_tensor_of_many_reads(self, tmp_path, dtype):
        """The differing elements lie at the ends of what is read and computed at once."""
        count = (9 << 20) // dtype.itemsize + 3
        a = torch.randn(count, generator=torch.Generator().manual_seed(1)).mul(100).to(dtype)
        b = a.clone()
        places = [0, (1 << 16) - 1, 1 << 16, (4 << 20) // dtype.itemsize, count - 1]
        for n, i in enumerate(places):
            b[i] += n + 1

        found = compared(tmp_path, a.view(1, -1), b.view(1, -1)).values["w"]
        wide = torch.complex128 if dtype.is_complex else torch.float64
        apart = (a.to(wide) - b.to(wide)).abs()
        assert (found.changed, found.elements) == (5, count)
        assert found.max_abs == pytest.approx(apart.max().item(), rel=1e-6)
        larger = torch.maximum(a.to(wide).abs(), b.to(wide).abs())
        assert found.max_rel == pytest.approx((apart[places] / larger[places]).max().item(), rel=1e-6)

    @pytest.mark.parametrize(
        ("a", "b", "as_"),
        [
            (torch.float32, torch.bfloat16, "F32"),
            (torch.float16, torch.bfloat16, "F32"),
            (torch.float8_e4m3fn, torch.float16, "F32"),
            (torch.float64, torch.float32, "F64"),
            (torch.int8, torch.float16, "F64"),
            (torch.int8, torch.int32, "I64"),
            (torch.bool, torch.uint64, "U64"),
            (torch.int64, torch.uint64, "F64"),
            (torch.float32, torch.complex64, "C128"),
        ],
    )
    def test_dtypes_that_differ(self, tmp_path, a, b, as_):
        values = torch.tensor([0.0, 1.0, 0.0, 1.0])
        report = compared(tmp_path, values.to(a), values.to(b))
        assert [(c.kind, c.name) for c in report.changes] == [("dtype", "w")]
        assert (report.values["w"].equal, report.values["w"].compared_as) == (True, as_)

        other = torch.tensor([0.0, 1.0, 1.0, 1.0])
        found = compared(tmp_path / "other", values.to(a), other.to(b)).values["w"]
        assert (found.changed, found.changed_share, found.max_abs, found.max_rel) == (1, 0.25, 1, 1.0)

    def test_the_largest_integers(self, tmp_path):
        low, high = -(1 << 63), (1 << 63) - 1
        found = compared(tmp_path, torch.tensor([low, 5, high]), torch.tensor([high, 5, high - 1])).values["w"]
        assert (found.changed, found.max_abs) == (2, (1 << 64) - 1)
        assert found.max_rel == 2.0

    def test_numbers_that_are_none(self, tmp_path):
        a = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 0.0])
        assert compared(tmp_path / "same", a, a.clone()).values["w"].equal
        assert compared(tmp_path / "zero", a, torch.tensor([math.nan, math.inf, -math.inf, 1.0, -0.0])).changes == ()
        found = compared(tmp_path / "not", a, torch.tensor([math.nan, -math.inf, -math.inf, math.nan, 0.0])).values["w"]
        assert (found.changed, found.max_abs, found.max_rel) == (2, math.inf, math.inf)
        # What single precision has no number for, double precision has.
        large = torch.tensor([3e38], dtype=torch.bfloat16)
        found = compared(tmp_path / "large", large, -large).values["w"]
        assert found.max_abs == 2 * large.double().item()

    def test_no_elements(self, tmp_path):
        report = compared(tmp_path, torch.zeros(0, 3), torch.zeros(0, 3))
        assert (report.changes, report.equal, report.values["w"].changed_share) == ((), 1, 0.0)


class TestCheckpoints:
    @pytest.mark.parametrize("form", ["safetensors", "pt"])
    def test_shards_and_formats(self, tmp_path, form):
        state = tensors()
        other = {name: tensor.clone() for name, tensor in state.items()}
        other["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
        other["model.norm.weight"] = other["model.norm.weight"].float()

        a = save(tmp_path / "a", state, shards=3)
        report = lading.diff_models(a, save(tmp_path / "b", other, form), values=True)
        assert [(c.name, c.kind) for c in report.changes] == [
            (name, "dtype" if "norm" in name else "values")
            for name in lading.index_checkpoint(a).manifest.names
            if name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight")
        ]
        assert (report.equal, report.unknown, len(report.values)) == (len(state) - 2, 0, len(state))
        assert report.values["model.norm.weight"].equal
        assert report.values["model.layers.1.mlp.up_proj.weight"].changed == 1

    def test_shapes_that_differ_are_not_read(self, tmp_path):
        report = compared(tmp_path, torch.zeros(2, 3), torch.zeros(3, 2))
        assert ([c.kind for c in report.changes], report.values) == (["shape"], {})

    def test_dtypes_that_torch_lacks_are_not_compared(self, tmp_path):
        header = json.dumps({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
        paths = []
        for name in "ab":
            paths.append(tmp_path / f"{name}.safetensors")
            paths[-1].write_bytes(len(header).to_bytes(8, "little") + header + name.encode() * 2)
        report = lading.diff_models(*paths, values=True)
        assert (report.changes, report.not_compared) == ((), ("w",))

    def test_equal_digests_need_no_read(self, cli, cards):
        folder = cards.parent / "tiny"
        lading.index_checkpoint("tiny")
        set_digests(f"file://{folder}")
        report = lading.diff_models("tiny", folder, values=True)
        assert (report.equal, report.values) == (len(tensors()), {})

    def test_digests_that_differ_are_read(self, cli, cards, tmp_path):
        folder = cards.parent / "tiny"
        make(tmp_path / "m")
        for path in (folder, tmp_path / "m"):
            lading.index_checkpoint(path)
            set_digests(f"file://{path}", **({"q_proj": "cut along another dim"} if path != folder else {}))
        report = lading.diff_models(folder, tmp_path / "m", values=True)
        assert (report.changes, report.equal, len(report.values)) == ((), len(tensors()), 2)


class TestCommand:
    @pytest.fixture
    def two(self, tmp_path):
        state = {"model.layers.0.w": torch.zeros(4), "model.layers.1.w": torch.ones(8), "norm": torch.ones(2)}
        changed = {**state, "model.layers.1.w": torch.ones(8)}
        changed["model.layers.1.w"][0] = 1.5
        changed["norm"] = torch.ones(2, dtype=torch.float16)

        return save(tmp_path / "a", state), save(tmp_path / "b", changed)

    def test_text(self, cli, two):
        result = cli("diff", *two, "--values")
        assert result.stdout.splitlines() == [
            "name              change  a    b    max abs  max rel  changed  compared as",
            "model.layers.1.w  values  -    -        0.5    0.333    12.5%  F32",
            "norm              dtype   F32  F16        0        0       0%  F32",
        ]
        assert "2 tensors of the same shape and dtype (values: 1 equal, 1 different, 0 not compared)\n" in result.stderr
        assert "--values" in cli("diff", *two).stderr

    def test_json(self, cli, two):
        rows = json.loads(cli("diff", *two, "--values", "--json").stdout)
        assert rows == [
            {
                "name": "model.layers.1.w",
                "change": "values",
                "a": None,
                "b": None,
                "max_abs": 0.5,
                "max_rel": pytest.approx(1 / 3),
                "changed": 0.125,
                "compared_as": "F32",
            },
            {
                "name": "norm",
                "change": "dtype",
                "a": "F32",
                "b": "F16",
                "max_abs": 0.0,
                "max_rel": 0.0,
                "changed": 0.0,
                "compared_as": "F32",
            },
        ]
        assert cli("diff", *two, "--values", "-q").stdout == "model.layers.1.w\nnorm\n"
        assert json.loads(cli("diff", two[0], two[0], "--values", "--json").stdout) == []

    def test_infinity(self, cli, tmp_path):
        paths = [save(tmp_path / name, {"w": torch.tensor([x])}) for name, x in (("a", 1.0), ("b", math.nan))]
        (row,) = json.loads(cli("diff", *paths, "--values", "--json").stdout)
        assert (row["max_abs"], row["max_rel"], row["changed"]) == ("inf", "inf", 1.0)

    def test_nearly_all_is_not_all(self, cli, tmp_path):
        state = torch.zeros(100_000)
        one, but_one = state.clone(), state + 1
        one[0], but_one[0] = 1, 0
        shown = [
            cli("diff", *(save(tmp_path / f"{i}{n}", {"w": x}) for n, x in enumerate(pair)), "--values").stdout
            for i, pair in enumerate([(state, one), (state, but_one)])
        ]
        assert " 0.01% " in shown[0]
        assert " 99.9% " in shown[1]

    def test_what_cannot_be_read(self, cli, cards, tmp_path, monkeypatch):
        monkeypatch.setenv("LADING_OFFLINE", "1")
        with pytest.raises(NotSupportedError, match="no values"):
            lading.diff_models("qwen/qwen3_0.6b", "qwen/qwen3_0.6b", values=True)
        cli("diff", "qwen/qwen3_0.6b", "qwen/qwen3_0.6b", "--values", code=2)

        (tmp_path / "remote.yaml").write_text(REMOTE)
        cli("import", tmp_path / "remote.yaml")
        from lading.catalog.checkpoints.record import record_checkpoint
        from lading.catalog.records import CheckpointContents

        manifest = lading.index_checkpoint("tiny").manifest
        database = lading.get_asset_store().database
        record_checkpoint(database, CheckpointContents(uri="hg://somebody/tiny", manifest=manifest, revision="abc"))
        with pytest.raises(CheckpointNotFoundError, match="lading pull remote"):
            lading.diff_models("tiny", "remote", values=True)


class TestLayers:
    def summary(self, cli, tmp_path: Path, names: list[str], differ: list[str]) -> str:
        a = {name: torch.zeros(1) for name in names}
        paths = save(tmp_path / "a", a), save(tmp_path / "b", a | {name: torch.ones(1) for name in differ})
        return cli("diff", *paths, "--values").stderr.splitlines()[1:]

    NAMES = [f"model.layers.{i}.{part}.weight" for i in range(28) for part in ("attn", "mlp")] + ["model.norm.weight"]

    @pytest.mark.parametrize(
        ("differ", "line"),
        [
            ([], None),
            (["model.norm.weight"], "1 of 57 tensors differ, none of them in a layer"),
            (["model.layers.3.mlp.weight"], "1 of 57 tensors differ, all in layer 3"),
            ([f"model.layers.{i}.mlp.weight" for i in range(20, 28)], "8 of 57 tensors differ, all in layers 20 to 27"),
            (
                [f"model.layers.{i}.mlp.weight" for i in (1, 3, 4)],
                "3 of 57 tensors differ, all in layers 1 and 3 to 4",
            ),
            (
                [f"model.layers.{i}.mlp.weight" for i in range(0, 28, 2)],
                "14 of 57 tensors differ, all in layers 0 to 26 (14 of 28)",
            ),
            (
                ["model.layers.9.attn.weight", "model.layers.10.attn.weight", "model.norm.weight"],
                "3 of 57 tensors differ: 2 in layers 9 to 10, 1 in no layer",
            ),
        ],
    )
    def test_one_stack(self, cli, tmp_path, differ, line):
        found = self.summary(cli, tmp_path, self.NAMES, differ)
        assert found == ([] if line is None else [f"lading: {line}"])

    def test_several_stacks(self, cli, tmp_path):
        names = [f"{stack}.layers.{i}.w" for stack in ("encoder", "decoder") for i in range(3)] + ["9999999999999.w"]
        found = self.summary(cli, tmp_path, names, ["encoder.layers.2.w", "decoder.layers.0.w", "decoder.layers.1.w"])
        assert found == ["lading: 3 of 7 tensors differ, all in decoder.layers 0 to 1 and encoder.layers 2"]

    def test_unread_values_may_differ_too(self, cli, tmp_path):
        state = {"layers.0.w": torch.zeros(1), "layers.1.w": torch.zeros(1)}
        paths = save(tmp_path / "a", state), save(tmp_path / "b", {"layers.0.w": torch.zeros(1)})
        assert cli("diff", *paths).stderr.splitlines()[1:] == [
            "lading: 1 of 2 tensors are known to differ, all in layer 1"
        ]

    def test_rows(self, cli, tmp_path):
        state = {f"layers.{i}.{part}": torch.ones(4) for i in range(12) for part in ("a", "b")} | {
            "norm": torch.ones(2)
        }
        other = {name: tensor.clone() for name, tensor in state.items()}
        other["layers.11.a"][0] = 3
        other["layers.11.b"][:] = 2
        other["layers.2.b"] = other.pop("layers.2.b").half()
        del other["norm"]
        paths = save(tmp_path / "a", state), save(tmp_path / "b", other)

        result = cli("diff", *paths, "--values", "--by-layer")
        assert [line.split() for line in result.stdout.splitlines()[1:]] == [
            ["layers.2", "1", "2", "0", "0", "0", "0%", "F32"],
            ["layers.11", "2", "2", "0", "2", "0.667", "62.5%", "F32"],
            ["-", "1", "1", "0", "-", "-", "-", "-"],
        ]
        rows = json.loads(cli("diff", *paths, "--values", "--by-layer", "--json").stdout)
        assert rows[1] == {
            "layer": "layers.11",
            "differ": 2,
            "tensors": 2,
            "not_compared": 0,
            "max_abs": 2.0,
            "max_rel": pytest.approx(2 / 3),
            "changed": 0.625,
            "compared_as": "F32",
        }
        assert [row["layer"] for row in rows] == ["layers.2", "layers.11", None]

        # Without values, a program learns of each layer that it may differ.
        rows = json.loads(cli("diff", *paths, "--by-layer", "--json").stdout)
        assert rows[0] == {"layer": "layers.0", "differ": 0, "tensors": 2, "not_compared": 2}
        assert len(rows) == 13
        assert len(cli("diff", *paths, "--by-layer").stdout.splitlines()) == 3

    def test_from_python(self, tmp_path):
        state = {"h.0.w": torch.zeros(2), "h.1.w": torch.zeros(2), "norm": torch.zeros(2)}
        report = lading.diff_models(
            save(tmp_path / "a", state), save(tmp_path / "b", state | {"h.1.w": torch.ones(2)}), values=True
        )
        assert [(layer.name, layer.tensors, layer.differ) for layer in report.layers()] == [
            ("h.0", 1, 0),
            ("h.1", 1, 1),
            ("", 1, 0),
        ]
        assert report.layers()[1].values == (report.values["h.1.w"],)


class TestRenames:
    def test_prefix(self, cli, tmp_path):
        """All norms are equal, and a norm without a counterpart is not read."""
        generator = torch.Generator().manual_seed(3)
        state = {f"layers.{i}.w": torch.randn(4, 4, generator=generator) for i in range(3)}
        state |= {f"layers.{i}.norm": torch.ones(4) for i in range(3)}
        other = {f"model.{name}": tensor for name, tensor in state.items()} | {"head": torch.zeros(3)}
        for form in ("safetensors", "pt"):
            a, b = save(tmp_path / form / "a", state, shards=2), save(tmp_path / form / "b", other, form)

            result = cli("diff", a, b, "--values")
            assert [line.split() for line in result.stdout.splitlines()[1:]] == [
                ["*", "(6", "tensors)", "renamed", "*", "model.*", *"----"],
                ["head", "only", "in", "B", "-", "F32", "[3]", *"----"],
            ]
            assert result.stderr.splitlines()[-1] == "lading: 1 of 7 tensors differ, none of them in a layer"
            rows = json.loads(cli("diff", a, b, "--values", "--json").stdout)
            assert [(row["change"], row["a"], row["b"]) for row in rows[:-1]] == [
                ("renamed", name, f"model.{name}") for name in lading.index_checkpoint(a).manifest.names
            ]
            assert "renamed" not in cli("diff", a, b).stdout

    def test_other_values_are_no_rename(self, tmp_path):
        a, b = torch.ones(4), torch.ones(4)
        b[0] = 2
        report = lading.diff_models(save(tmp_path / "a", {"a": a}), save(tmp_path / "b", {"b": b}), values=True)
        assert [(c.name, c.kind) for c in report.changes] == [("a", "only in A"), ("b", "only in B")]

    def test_several_equal_ones(self, tmp_path):
        a, b = ({name: torch.ones(4) for name in names} for names in ("ab", "cd"))
        report = lading.diff_models(save(tmp_path / "a", a), save(tmp_path / "b", b), values=True)
        assert {c.kind for c in report.changes} == {"only in A", "only in B"}
