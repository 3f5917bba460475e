"""Architectures of the catalog against fairseq2's, which ``dump_fairseq2_configs.py`` wrote beside this file, and those
of Omnilingual ASR, which ``dump_omnilingual_configs.py`` wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lading.families.gemma3n import Gemma3nAudioConfig, Gemma3nConfig, get_gemma3n_model_hub
from lading.families.jepa import JepaConfig, get_jepa_model_hub
from lading.families.jepa_classifier import JepaClassifierConfig, get_jepa_classifier_model_hub
from lading.families.llama import LLaMAConfig, get_llama_model_hub
from lading.families.llama4 import Llama4Config, get_llama4_model_hub
from lading.families.mistral import MistralConfig, get_mistral_model_hub
from lading.families.nllb import NllbConfig, get_nllb_model_hub
from lading.families.olmo import OLMOConfig, YaRNScaleConfig, get_olmo_model_hub
from lading.families.qwen import QwenConfig, get_qwen_model_hub
from lading.families.s2t_conformer import S2TConformerConfig, get_s2t_conformer_model_hub
from lading.families.s2t_transformer import S2TTransformerConfig, get_s2t_transformer_model_hub
from lading.families.w2vbert import W2VBertConfig, get_w2vbert_model_hub
from lading.families.wav2vec2 import Wav2Vec2Config, get_wav2vec2_model_hub
from lading.families.wav2vec2_asr import Wav2Vec2AsrConfig, get_wav2vec2_asr_model_hub
from lading.models.hub import ModelHub

DUMPED: dict[str, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("fairseq2_configs.json").read_text(encoding="utf-8")
)["families"]

OMNILINGUAL: dict[str, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("omnilingual_configs.json").read_text(encoding="utf-8")
)

CONFIGS: dict[str, type] = {
    "gemma3n": Gemma3nConfig,
    "jepa": JepaConfig,
    "jepa_classifier": JepaClassifierConfig,
    "llama": LLaMAConfig,
    "llama4": Llama4Config,
    "mistral": MistralConfig,
    "nllb": NllbConfig,
    "olmo": OLMOConfig,
    "qwen": QwenConfig,
    "s2t_conformer": S2TConformerConfig,
    "s2t_transformer": S2TTransformerConfig,
    "w2vbert": W2VBertConfig,
    "wav2vec2": Wav2Vec2Config,
    "wav2vec2_asr": Wav2Vec2AsrConfig,
}
OPTIONAL: dict[str, type] = {"audio_config": Gemma3nAudioConfig, "yarn_scale_config": YaRNScaleConfig}
"""Fields that hold no object by default, and the class of one."""
HUBS: dict[str, Callable[[], ModelHub[Any, Any]]] = {
    "gemma3n": get_gemma3n_model_hub,
    "jepa": get_jepa_model_hub,
    "jepa_classifier": get_jepa_classifier_model_hub,
    "llama": get_llama_model_hub,
    "llama4": get_llama4_model_hub,
    "mistral": get_mistral_model_hub,
    "nllb": get_nllb_model_hub,
    "olmo": get_olmo_model_hub,
    "qwen": get_qwen_model_hub,
    "s2t_conformer": get_s2t_conformer_model_hub,
    "s2t_transformer": get_s2t_transformer_model_hub,
    "w2vbert": get_w2vbert_model_hub,
    "wav2vec2": get_wav2vec2_model_hub,
    "wav2vec2_asr": get_wav2vec2_asr_model_hub,
}


def plain(config: Any) -> dict[str, Any]:
    """As the values of JSON, in which tuples are lists."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))

    return values


def laid_over(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``values``, and what only ``defaults`` has, in objects within, too."""
    laid = dict(defaults)
    for key, value in values.items():
        if isinstance(value, dict):
            value = laid_over(defaults[key] or plain(OPTIONAL[key]()), value)
        laid[key] = value

    return laid


@pytest.mark.parametrize(
    ("family", "arch"),
    [
        ("jepa", "base"),
        ("jepa_classifier", "base"),
        ("llama", "7b"),
        ("mistral", "7b"),
        ("nllb", "dense_1b"),
        ("olmo", "olmo2_1b"),
        ("qwen", "qwen25_7b"),
        ("s2t_conformer", "medium"),
        ("s2t_transformer", "medium"),
        ("w2vbert", "600m"),
        ("wav2vec2", "base"),
        ("wav2vec2_asr", "base_10h"),
    ],
)
def test_the_defaults_of_the_config_classes(family: str, arch: str) -> None:
    found = plain(CONFIGS[family]())

    assert found == laid_over(found, DUMPED[family][arch])


@pytest.mark.parametrize("family", HUBS)
def test_architectures(family: str, home: Path) -> None:
    """Fields that only this project has keep their defaults, which mean what fairseq2 does."""
    hub = HUBS[family]()
    defaults = plain(CONFIGS[family]())
    architectures = DUMPED[family] | OMNILINGUAL.get(family, {})

    assert hub.get_archs() >= architectures.keys()
    for arch, expected in architectures.items():
        assert plain(hub.get_arch_config(arch)) == laid_over(defaults, expected), arch
