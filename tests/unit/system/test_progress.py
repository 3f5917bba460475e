"""Progress bars in a terminal and in notebooks, each in a process that imports them first."""

from __future__ import annotations

import subprocess
import sys

import pytest

BAR = """
from lading.system.progress import byte_bar

with byte_bar(2_000_000, "fetch") as bar:
    bar.delay = 0
    bar.update(1_000_000)
    bar.refresh()
print(type(bar).__mro__)
"""

NOTEBOOK = """
import sys, types

sys.modules["IPython"] = kernel = types.ModuleType("IPython")
kernel.get_ipython = lambda: types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
sys.modules["IPython.display"] = types.ModuleType("IPython.display")
sys.modules["IPython.display"].display = print
sys.modules["ipywidgets"] = None
"""

WIDGETS = """
from unittest.mock import MagicMock

sys.modules["ipywidgets"] = widgets = types.ModuleType("ipywidgets")
widgets.HBox = type("HBox", (MagicMock,), {})
widgets.FloatProgress = widgets.HTML = MagicMock
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "arning" not in done.stderr
    return done


@pytest.mark.parametrize("place", ["", NOTEBOOK], ids=["terminal", "notebook without widgets"])
def test_a_bar_is_text_on_stderr(place: str) -> None:
    done = run(place + BAR)
    assert "fetch:  50%" in done.stderr
    assert "notebook" not in done.stdout
    assert "fetch" not in done.stdout


def test_a_bar_is_a_widget_where_there_are_widgets() -> None:
    done = run(NOTEBOOK + WIDGETS + BAR)
    assert "tqdm.notebook" in done.stdout
    assert done.stderr == ""


def test_the_import_is_light() -> None:
    done = run("import sys, lading.system.progress; print([m for m in sys.modules if m.startswith('tqdm')])")
    assert done.stdout == "[]\n"
