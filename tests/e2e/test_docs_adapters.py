"""docs/how-to/load-a-lora-adapter.md: its cards and commands."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.helpers.console_blocks import Shell, run_page
from tests.helpers.make_adapter import Q_PROJ, factors, write_adapter
from tests.helpers.make_checkpoint import make
from tests.helpers.nursery import Nursery

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "load-a-lora-adapter.md").read_text(encoding="utf-8")


def test_the_page(home: Path, nursery: Nursery, tmp_path: Path) -> None:
    work = tmp_path / "work"
    make(work / "tiny-qwen")
    for seed, name in enumerate(("my-lora", "my-style")):
        write_adapter(work / name, factors(Q_PROJ, 32, 32, seed=seed))
    ((name, text),) = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (work / name).write_text(text)
    run_page(PAGE, Shell(nursery, work, tmp_path / "bin", os.environ))

    assert (work / "blend" / "model.safetensors").is_file()
