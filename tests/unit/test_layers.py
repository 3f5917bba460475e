"""Imports point downward only, and the light parts stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lading

ROOT = Path(lading.__file__).parent

LAYERS = [
    {"errors"},
    {"system"},
    {"formats"},
    {"cards", "gangs", "planning", "sources"},
    {"catalog", "transfer"},
    {"checkpoints"},
    {"models"},
    {"families", "operations"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def _room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("lading.")}


FILES = [p for p in sorted(ROOT.rglob("*.py")) if _room(p) not in {"__init__", "__main__", "migrations", "seeds"}]


def test_every_room_has_its_level() -> None:
    assert {_room(p) for p in FILES} <= LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    room = _room(path)
    for name in _imports(path):
        other = name.split(".")[1]
        if other in {"migrations", "seeds"}:
            pytest.fail(f"{path} imports {name}: migrations and seeds are data, found by name")
        if other == room or other not in LEVEL:
            continue
        assert LEVEL[other] < LEVEL[room], f"{path} imports {name}, which does not lie below it"


def test_no_cycle_between_files() -> None:
    modules = {
        ".".join(("lading", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p for p in FILES
    }
    imports = {name: _imports(path) for name, path in modules.items()}
    graph = {
        name: {m for m in modules for i in imports[name] if i == m or i.rpartition(".")[0] == m} - {name}
        for name in modules
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


LIGHT = [
    "import lading; dir(lading)",
    "import lading.errors, lading.cards.card, lading.formats.manifest, lading.system.settings",
    "import lading.planning.plan, lading.planning.rules, lading.planning.composition",
    "import lading.formats, lading.sources",
    "import lading.catalog.store, lading.catalog.query",
    "import lading; lading.catalog.session; lading.catalog.CardRow",
    "import lading.cli",
    "import lading.checkpoints.locate",
]


@pytest.fixture(scope="module")
def modules_after() -> dict[str, set[str]]:
    """The modules that are imported after each of these and those before it, in one process."""
    script = "import sys\n" + "".join(f"{code}\nprint(' '.join(sys.modules))\n" for code in LIGHT)
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return {code: set(line.split()) for code, line in zip(LIGHT, out.splitlines(), strict=True)}


@pytest.mark.parametrize("code", LIGHT)
def test_light_parts_stay_light(modules_after: dict[str, set[str]], code: str) -> None:
    heavy = {"torch", "pydantic", "alembic", "numpy", "transformers", "huggingface_hub", "ruamel.yaml"}
    assert not (modules_after[code] & heavy)


def test_the_public_names() -> None:
    assert sorted(lading.__all__) == sorted(
        """
        AssetCard AssetCardField Architecture AssetStore CardStore get_asset_store catalog register_checkpoint_models
        load_model ModelHub ModelHubAccessor GlobalModelLoader LoadReport
        CPU DataType Device get_current_device get_model_family_name register_family Buffer
        pull_model PullReport verify_model VerifyReport read_digests write_digests DigestReport
        convert_checkpoint export_model ExportReport
        load_tokenizer Tokenizer TokenEncoder TokenDecoder VocabularyInfo
        import_cards index_checkpoint query check_model CheckReport diff_models DiffReport plan_load LoadPlan
        add_checkpoints AddedCard register_model remove_cards rename_card relocate_checkpoints CardChange
        adopt_checkpoints Adoption disk_usage DiskUsage DiskUsageEntry remove_model remove_orphans Removal
        Family Rule ParallelPlan Split Stages Manifest Gang Gangs create_fake_gangs create_gangs simulate_gangs
        LadingError ModelNotKnownError ModelFamilyNotKnownError ModelArchitectureNotKnownError ModelGatedError
        AssetCardError CardFileError ModelConfigError AssetNotFoundError
        ModelCheckpointError CorruptModelCheckpointError
        ModelCheckpointMismatchError DigestMismatchError NotSupportedError GangError FetchError CatalogError
        CatalogOutdatedError PolicyError RefusedPickleError QueryError InternalError __version__ QueryResult
        TorchNotFoundError
        """.split()
    )


@pytest.mark.parametrize("name", lading.__all__)
def test_each_public_name_is_there(name: str) -> None:
    assert getattr(lading, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nope"):
        _ = lading.nope
