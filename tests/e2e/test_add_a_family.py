"""docs/how-to/add-a-family.md: the package that it shows, installed as an installer would leave it, and used."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from lading.catalog.importing import refresh
from tests.helpers.nursery import Nursery

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "nplm"
PAGE = (ROOT / "docs" / "how-to" / "add-a-family.md").read_text(encoding="utf-8")

Run = Callable[..., str]


def test_the_page_shows_the_package_as_it_is() -> None:
    shown = dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    assert shown.keys() == {"pyproject.toml", "lading_nplm/family.py", "lading_nplm/nplm.yaml"}
    assert all(text == (PACKAGE / name).read_text(encoding="utf-8") for name, text in shown.items())
    assert len(PAGE.splitlines()) < 200


def install(site: Path, package: Path = PACKAGE) -> None:
    """What `pip install -e` leaves on the path of a program, without a build, which may need a network."""
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def run(catalog: Path, nursery: Nursery, tmp_path: Path) -> Run:
    """Runs lading, or a script, with the package on the path of Python; gives what it printed."""
    install(tmp_path / "site")

    def run(*words: str | Path, path: tuple[Path, ...] = (tmp_path / "site", PACKAGE)) -> str:
        code = f"import sys\nsys.path[:0] = {[str(folder) for folder in path]}\n"
        match words:
            case ["lading", *words]:
                code += "from lading.cli import main\nsys.argv[0] = 'lading'\nmain()"
            case [script, *words]:
                code += f"import runpy\nrunpy.run_path({str(script)!r}, run_name='__main__')"
        done = nursery.run(["-c", code, *words], os.environ)
        assert done.code == 0, done.out + done.err
        assert "Traceback" not in done.err
        return done.out + done.err

    return run


SCRIPT = """
import sys
from pathlib import Path

import torch
from lading import load_model, simulate_gangs
from lading_nplm.family import NPLM, NPLMConfig, get_nplm_model_hub

folder = Path(sys.argv[1])
hub = get_nplm_model_hub()
assert hub.get_archs() == {"brown"}
assert {card.name for card in hub.iter_cards()} == {"nplm_brown", "nplm_mine"}
assert hub.create_new_model(hub.get_arch_config("brown"), meta=True).output.weight.shape == (16_384, 100)

config = NPLMConfig(vocab_size=12, context=2, model_dim=3, hidden_dim=4)
torch.manual_seed(0)
new = hub.create_new_model(config)
assert isinstance(new, NPLM) and float(new.embed.weight.detach().abs().max()) <= 0.01 and not new.output.bias.any()
names = {"C": "embed.weight", "H": "hidden.weight", "d": "hidden.bias", "U": "output.weight", "b": "output.bias"}
torch.save({short: new.state_dict()[name] for short, name in names.items()}, folder / "bengio.pt")

loaded = load_model("nplm_mine")
assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), new.parameters(), strict=True))
assert loaded(torch.tensor([[1, 2]])).shape == (1, 12)

for rank in range(2):
    with simulate_gangs(rank, tp=2) as gangs:
        torch.manual_seed(0)
        for part in (load_model("nplm_mine", gangs=gangs), hub.create_new_model(config, gangs=gangs)):
            for name, dim in (("embed", 0), ("hidden", 0), ("output", 1)):
                mine = part.get_submodule(name).weight.to_local()
                assert torch.equal(mine, new.get_submodule(name).weight.chunk(2, dim)[rank]), name
print("good")
"""


def test_it_works(run: Run, tmp_path: Path) -> None:
    listed = json.loads(run("lading", "list", "nplm*", "--json"))
    assert [(model["name"], model["family"], model["status"]) for model in listed] == [("nplm_brown", "nplm", "gated")]
    assert "brown" in run("lading", "archs", "nplm")

    card = tmp_path / "mine.yaml"
    config = "{vocab_size: 12, context: 2, model_dim: 3, hidden_dim: 4}"
    card.write_text(f"name: nplm_mine\nmodel_family: nplm\nmodel_config: {config}\ncheckpoint: bengio.pt\n")
    run("lading", "import", card)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert "good" in run(script, tmp_path)

    # The cards leave with the package.
    assert "nplm_brown" not in run("lading", "list", "--all", "nplm*", path=())


def test_cards_of_a_package_that_is_wrong_close_nothing(run: Run, tmp_path: Path) -> None:
    package = tmp_path / "bad" / "bad_cards"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "cards.yaml").write_text("name: fine\nmodel_family: nplm\n---\nname: [1]\n")
    info = tmp_path / "site" / "bad-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lading.seeds]\nbad = bad_cards\ngone = nowhere.at_all\n")

    said = run("lading", "list", "--all", "fine", path=(tmp_path / "site", PACKAGE, tmp_path / "bad"))
    assert "fine" in said
    assert "cards.yaml[1]" in said
    assert "nowhere.at_all" in said


def test_a_folder_of_a_package_is_found_without_importing_it() -> None:
    assert refresh._package_folder("lading.catalog.importing") == Path(refresh.__file__).parent
    with pytest.raises(ModuleNotFoundError):
        refresh._package_folder("lading.nothing.like.that")
    with pytest.raises(ModuleNotFoundError):
        refresh._package_folder("nothing_like_that")
