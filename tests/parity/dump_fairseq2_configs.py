"""Print every LLaMA, Qwen and Mistral architecture of fairseq2 as JSON: family → architecture → configuration.

Run it where fairseq2 0.8.1 is installed::

    python tests/parity/dump_fairseq2_configs.py > tests/parity/fairseq2_configs.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fairseq2.models.llama.config import register_llama_configs
from fairseq2.models.mistral.config import register_mistral_configs
from fairseq2.models.qwen.config import register_qwen_configs


class Recorder:
    """Stands for fairseq2's dependency container, which its registration functions only hand their factories to."""

    def __init__(self) -> None:
        self.configs: dict[str, dict[str, Any]] = {}

    def register(self, kls: type, factory: Callable[[Any], Any], *, key: str) -> None:
        self.configs[key] = asdict(factory(self))


def main() -> None:
    families = {}
    for family, register in (
        ("llama", register_llama_configs),
        ("mistral", register_mistral_configs),
        ("qwen", register_qwen_configs),
    ):
        recorder = Recorder()
        register(recorder)
        families[family] = recorder.configs

    json.dump({"fairseq2": version("fairseq2"), "families": families}, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
