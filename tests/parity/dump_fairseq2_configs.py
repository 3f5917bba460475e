"""Print every architecture of fairseq2 as JSON: family → architecture → configuration.

Run it where fairseq2 0.8.1 is installed::

    python tests/parity/dump_fairseq2_configs.py > tests/parity/fairseq2_configs.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from importlib.metadata import version
from typing import Any

from fairseq2.models.gemma3n.config import Gemma3nConfig, register_gemma3n_configs
from fairseq2.models.jepa.classifier.config import JepaClassifierConfig, register_jepa_classifier_configs
from fairseq2.models.jepa.config import JepaConfig, register_jepa_configs
from fairseq2.models.llama.config import LLaMAConfig, register_llama_configs
from fairseq2.models.llama4.config import Llama4Config, register_llama4_configs
from fairseq2.models.mistral.config import MistralConfig, register_mistral_configs
from fairseq2.models.nllb.config import NllbConfig, register_nllb_configs
from fairseq2.models.olmo.config import OLMOConfig, register_olmo_configs
from fairseq2.models.qwen.config import QwenConfig, register_qwen_configs
from fairseq2.models.s2t_conformer.config import S2TConformerConfig, register_s2t_conformer_configs
from fairseq2.models.s2t_transformer.config import S2TTransformerConfig, register_s2t_transformer_configs
from fairseq2.models.w2vbert.config import W2VBertConfig, register_w2vbert_configs
from fairseq2.models.wav2vec2.asr.config import Wav2Vec2AsrConfig, register_wav2vec2_asr_configs
from fairseq2.models.wav2vec2.config import Wav2Vec2Config, register_wav2vec2_configs


class Recorder:
    """Stands for fairseq2's dependency container, as far as its registration functions look at it."""

    def __init__(self) -> None:
        self.factories: dict[tuple[type, str], Callable[[Any], Any]] = {}

    def register(self, kls: type, factory: Callable[[Any], Any], *, key: str) -> None:
        self.factories[kls, key] = factory

    def resolve(self, kls: type, *, key: str) -> Any:
        return self.factories[kls, key](self)

    def configs(self, kls: type) -> dict[str, dict[str, Any]]:
        return {key: asdict(self.resolve(kls, key=key)) for found, key in self.factories if found is kls}


def main() -> None:
    recorder = Recorder()
    families = {}
    for family, kls, register in (
        ("gemma3n", Gemma3nConfig, register_gemma3n_configs),
        ("jepa", JepaConfig, register_jepa_configs),
        ("jepa_classifier", JepaClassifierConfig, register_jepa_classifier_configs),
        ("llama", LLaMAConfig, register_llama_configs),
        ("llama4", Llama4Config, register_llama4_configs),
        ("mistral", MistralConfig, register_mistral_configs),
        ("nllb", NllbConfig, register_nllb_configs),
        ("olmo", OLMOConfig, register_olmo_configs),
        ("qwen", QwenConfig, register_qwen_configs),
        ("s2t_conformer", S2TConformerConfig, register_s2t_conformer_configs),
        ("s2t_transformer", S2TTransformerConfig, register_s2t_transformer_configs),
        ("w2vbert", W2VBertConfig, register_w2vbert_configs),
        ("wav2vec2", Wav2Vec2Config, register_wav2vec2_configs),
        ("wav2vec2_asr", Wav2Vec2AsrConfig, register_wav2vec2_asr_configs),
    ):
        register(recorder)
        families[family] = recorder.configs(kls)

    # As its card files name the members of enumerations.
    dumped = {"fairseq2": version("fairseq2"), "families": families}
    json.dump(dumped, sys.stdout, indent=1, default=lambda value: value.name if isinstance(value, Enum) else value)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
