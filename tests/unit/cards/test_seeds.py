"""The built-in architectures and cards against what is published about the models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest
import torch

from lading.cards.card import (
    ArchitectureEntry,
    AssetCard,
    CardEntry,
    checkpoint_ref,
    resolve_architecture,
    resolve_card,
)
from lading.cards.card_file import CardFile, parse
from lading.cards.config import architecture_config, resolve_config
from lading.models.family import get_family
from tests.helpers.native_families import NATIVE

SEEDS: dict[str, CardFile] = {
    file.name: parse(file.read_bytes(), source=f"package:lading.seeds/{file.name}")
    for file in sorted(files("lading.seeds").iterdir(), key=lambda file: file.name)
    if file.name.endswith(".yaml")
}

CARDS: dict[str, CardEntry] = {card.name: card for seed in SEEDS.values() for card in seed.cards}
ARCHITECTURES: dict[tuple[str, str], ArchitectureEntry] = {
    (architecture.family, architecture.name): architecture
    for seed in SEEDS.values()
    for architecture in seed.architectures
}
OURS = sorted(key for key in ARCHITECTURES if key[0] in NATIVE)

# What each model's `config.json` calls `intermediate_size`.
INTERMEDIATE_SIZES = {
    "7b": 11_008,
    "13b": 13_824,
    "33b": 17_920,
    "65b": 22_016,
    "llama2_7b": 11_008,
    "llama2_13b": 13_824,
    "llama2_70b": 28_672,
    "llama3_8b": 14_336,
    "llama3_70b": 28_672,
    "llama3_1_8b": 14_336,
    "llama3_1_70b": 28_672,
    "llama3_1_405b": 53_248,
    "llama3_2_1b": 8192,
    "llama3_2_3b": 8192,
}

# Tied weights are counted once, buffers are not. These pin every number that gives a tensor its shape.
PARAMETERS = {
    ("bert", "all_minilm_l6"): 22_713_216,
    ("bert", "bert_base"): 109_482_240,
    ("bert", "bert_large"): 335_141_888,
    ("gemma3", "270m"): 268_098_176,
    ("gemma3", "1b"): 999_885_952,
    ("gemma3", "4b"): 3_880_263_168,
    ("gemma3", "12b"): 11_766_034_176,
    ("gemma3", "27b"): 27_009_346_304,
    ("gemma3n", "e2b"): 4_435_182_688,
    ("gemma3n", "e4b"): 6_835_235_568,
    ("jepa", "tiny"): 5_486_400,
    ("jepa", "small"): 21_589_632,
    ("jepa", "base"): 85_646_592,
    ("jepa", "large"): 303_098_880,
    ("jepa", "huge"): 630_664_960,
    ("jepa", "giant"): 1_011_092_608,
    ("jepa", "gigantic"): 1_842_645_888,
    ("jepa_classifier", "base"): 93_504_232,
    ("jepa_classifier", "large"): 316_721_128,
    ("jepa_classifier", "huge"): 651_624_680,
    ("llama", "7b"): 6_738_415_616,
    ("llama", "13b"): 13_015_864_320,
    ("llama", "33b"): 32_528_943_616,
    ("llama", "65b"): 65_285_660_672,
    ("llama", "llama2_7b"): 6_738_415_616,
    ("llama", "llama2_13b"): 13_015_864_320,
    ("llama", "llama2_70b"): 68_976_648_192,
    ("llama", "llama3_8b"): 8_030_261_248,
    ("llama", "llama3_70b"): 70_553_706_496,
    ("llama", "llama3_1_8b"): 8_030_261_248,
    ("llama", "llama3_1_70b"): 70_553_706_496,
    ("llama", "llama3_1_405b"): 405_853_388_800,
    ("llama", "llama3_2_1b"): 1_235_814_400,
    ("llama", "llama3_2_3b"): 3_212_749_824,
    ("llama4", "llama4_scout_17b_16e"): 107_769_861_120,
    ("llama4", "llama4_maverick_17b_128e"): 400_711_848_960,
    ("mistral", "7b"): 7_241_732_096,
    ("mistral", "7b_v0.2"): 7_241_732_096,
    ("mistral", "7b_v0.3"): 7_248_023_552,
    ("mistral", "nemo"): 12_247_782_400,
    ("deepseek", "v3"): 671_026_404_352,
    ("mixtral", "mixtral_8x7b"): 46_702_792_704,
    ("mixtral", "mixtral_8x22b"): 140_620_634_112,
    ("nllb", "dense_300m"): 438_716_416,
    ("nllb", "dense_600m"): 615_073_792,
    ("nllb", "dense_1b"): 1_370_638_336,
    ("nllb", "dense_3b"): 3_344_863_232,
    ("olmo", "olmo2_1b"): 1_484_916_736,
    ("olmo", "olmo2_7b"): 7_298_617_344,
    ("olmo", "olmo2_13b"): 13_716_198_400,
    ("olmo", "olmo2_32b"): 32_234_279_936,
    ("olmo", "olmo3_7b"): 7_298_011_136,
    ("olmo", "olmo3_32b"): 32_233_522_176,
    ("qwen", "qwen25_0.5b"): 494_032_768,
    ("qwen", "qwen25_1_5b"): 1_543_714_304,
    ("qwen", "qwen25_3b"): 3_085_938_688,
    ("qwen", "qwen25_7b"): 7_615_616_512,
    ("qwen", "qwen25_14b"): 14_770_033_664,
    ("qwen", "qwen25_32b"): 32_763_876_352,
    ("qwen", "qwen25_72b"): 72_706_203_648,
    ("qwen", "qwen3_0.6b"): 596_049_920,
    ("qwen", "qwen3_1.7b"): 1_720_574_976,
    ("qwen", "qwen3_4b"): 4_022_468_096,
    ("qwen", "qwen3_8b"): 8_190_735_360,
    ("qwen", "qwen3_14b"): 14_768_307_200,
    ("qwen", "qwen3_32b"): 32_762_123_264,
    ("qwen3_moe", "qwen3_30b_a3b"): 30_532_122_624,
    ("qwen3_moe", "qwen3_235b_a22b"): 235_093_634_560,
    ("s2t_conformer", "medium"): 42_223_872,
    ("s2t_transformer", "tiny"): 14_741_760,
    ("s2t_transformer", "small"): 32_096_256,
    ("s2t_transformer", "medium"): 76_327_936,
    ("s2t_transformer", "large"): 278_074_368,
    ("w2vbert", "300m"): 306_718_528,
    ("w2vbert", "600m"): 609_433_408,
    ("wav2vec2", "base"): 95_044_608,
    ("wav2vec2", "large"): 317_380_864,
    ("wav2vec2", "large_lv60k"): 317_390_592,
    ("wav2vec2", "xlsr_base"): 317_390_592,
    ("wav2vec2", "1b"): 965_514_752,
    ("wav2vec2", "3b"): 3_064_124_672,
    ("wav2vec2", "7b"): 6_488_487_168,
    ("wav2vec2_asr", "base_10h"): 94_396_320,
    ("wav2vec2_asr", "base_100h"): 94_396_320,
    ("wav2vec2_asr", "large_10h"): 315_461_792,
    ("wav2vec2_asr", "large_100h"): 315_461_792,
    ("wav2vec2_asr", "large_lv60k_10h"): 315_471_520,
    ("wav2vec2_asr", "large_lv60k_100h"): 315_471_520,
    ("wav2vec2_asr", "300m"): 325_494_996,
    ("wav2vec2_asr", "1b"): 975_065_300,
    ("wav2vec2_asr", "3b"): 3_080_423_636,
    ("wav2vec2_asr", "7b"): 6_504_786_132,
    ("wav2vec2_asr", "300m_v2"): 325_982_896,
    ("wav2vec2_asr", "1b_v2"): 975_675_056,
    ("wav2vec2_asr", "3b_v2"): 3_081_398_960,
    ("wav2vec2_asr", "7b_v2"): 6_505_761_456,
}

CORRECTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "13b"): {"num_layers": 40},
    ("llama", "llama2_13b"): {"num_layers": 40},
    ("olmo", "olmo2_32b"): {"ffn_inner_dim": 27_648},
}
"""Numbers of published models that are not fairseq2's: a card for a published checkpoint states them."""


def card(name: str) -> AssetCard:
    def look_up(name: str) -> Mapping[str, CardEntry]:
        return {"": CARDS[name]} if name in CARDS else {}

    found = resolve_card(name, (), look_up)
    assert found is not None

    return found


def config_of(family: str, arch: str) -> Any:
    architecture = resolve_architecture(arch, family, lambda name: ARCHITECTURES.get((family, name)))
    assert architecture is not None

    return architecture_config(architecture, get_family(family).config_kls)


def build(family: str, config: Any) -> torch.nn.Module:
    with torch.device("meta"):
        module: torch.nn.Module = get_family(family).build(config)

    return module


@pytest.mark.parametrize("name", SEEDS)
def test_files_have_no_problems(name: str) -> None:
    assert SEEDS[name].problems == ()


def test_every_family_has_a_file() -> None:
    assert {f"{family}.yaml" for family in NATIVE} <= SEEDS.keys()


def test_names_are_unique_over_all_files() -> None:
    assert len(CARDS) == sum(len(seed.cards) for seed in SEEDS.values())
    assert len(ARCHITECTURES) == sum(len(seed.architectures) for seed in SEEDS.values())


@pytest.mark.parametrize("name", CARDS)
def test_cards_resolve(name: str) -> None:
    found = card(name)

    assert found.has_field("model_family") or found.has_field("dataset_family") or found.has_field("tokenizer_family")
    if (arch := found.maybe_get_field("model_arch")) is not None:
        assert (found.field("model_family").as_(str), arch.value) in ARCHITECTURES


@pytest.mark.parametrize("name", [name for name in CARDS if card(name).has_field("model_arch")])
def test_configurations_of_cards_fit_their_families(name: str) -> None:
    found = card(name)
    name_of_family = found.field("model_family").as_(str)
    family = get_family(name_of_family)
    arch = found.field("model_arch").as_(str)
    architecture = resolve_architecture(arch, name_of_family, lambda name: ARCHITECTURES.get((name_of_family, name)))

    assert isinstance(resolve_config(found, architecture, family.config_kls), family.config_kls)


def test_every_architecture_has_its_published_number_of_parameters() -> None:
    assert {*OURS} == PARAMETERS.keys()


@pytest.mark.parametrize("key", OURS, ids="-".join)
def test_architectures_build(key: tuple[str, str]) -> None:
    family, arch = key
    config = config_of(family, arch)

    assert type(config) is get_family(family).config_kls
    parameters = sum(p.numel() for p in build(family, replace(config, **CORRECTIONS.get(key, {}))).parameters())
    assert parameters == PARAMETERS[key]


@pytest.mark.parametrize("arch", INTERMEDIATE_SIZES)
def test_inner_dimensions_of_llama(arch: str) -> None:
    assert config_of("llama", arch).gated_inner_dim() == INTERMEDIATE_SIZES[arch]


def test_every_inner_dimension_of_llama_is_checked() -> None:
    assert INTERMEDIATE_SIZES.keys() == {arch for family, arch in OURS if family == "llama"}


@pytest.mark.parametrize("name", [name for name in CARDS if card(name).maybe_get_field("model_arch") is not None])
def test_only_what_meta_publishes_is_gated(name: str) -> None:
    found = card(name)
    ref = checkpoint_ref(found)

    if found.field("model_family").value in ("llama", "llama4") and not name.startswith("r1_"):
        assert (ref.gated, str(ref.info_url).rstrip("/")) == (True, "https://ai.meta.com/llama")
    else:
        assert not ref.gated


@pytest.mark.parametrize("key", ["checkpoint", "tokenizer"])
@pytest.mark.parametrize("family", NATIVE)
def test_no_two_cards_share_a_checkpoint(family: str, key: str) -> None:
    stated = [
        entry.metadata[key]
        for entry in SEEDS[f"{family}.yaml"].cards
        if key in entry.metadata and (entry.name, key) != ("s2t_conformer_covost_st_en_de_rel_pos", "tokenizer")
    ]

    assert len({str(uri).lower() for uri in stated}) == len(stated)


@pytest.mark.parametrize(
    ("name", "license"),
    [
        ("llama2_13b_chat", "llama2"),
        ("llama3_8b_instruct", "llama3"),
        ("llama3_1_405b", "llama3.1"),
        ("llama3_2_1b_instruct", "llama3.2"),
        ("llama3_3_70b_instruct", "llama3.3"),
        ("r1_distilled_llama3_1_8b_instruct", "mit"),
        ("llama4_scout_17b_16e_instruct", "llama4"),
        ("qwen25_0.5b", "apache-2.0"),
        ("qwen25_3b_instruct", "qwen-research"),
        ("qwen25_72b", "qwen"),
        ("qwen3_0.6b", "apache-2.0"),
        ("mistral_nemo_base_2407", "apache-2.0"),
        ("olmo-3-1025-7b", "apache-2.0"),
        ("gemma3_1b", "gemma"),
        ("gemma3n_e4b_instruct", "gemma"),
        ("all-minilm-l6-v2", "apache-2.0"),
        ("wav2vec2_asr_base_10h", "mit"),
        ("nllb-200_dense_3b", "cc-by-nc-4.0"),
        ("s2t_conformer_covost_st_en_de_rel_pos", "mit"),
        ("s2t_transformer_mustc_st_jt_m", "mit"),
        ("omniASR_W2V_1B", "apache-2.0"),
        ("omniASR_CTC_7B_v2", "apache-2.0"),
        ("jepa_vitl16", "cc-by-nc-4.0"),
    ],
)
def test_licenses(name: str, license: str) -> None:  # noqa: A002
    assert card(name).field("license").as_(str) == license


def test_the_sentence_encoder_gives_normalised_means() -> None:
    config = config_of("bert", "all_minilm_l6")

    assert (config.pooling, config.normalize, config.pooler) == ("mean", True, True)
    assert checkpoint_ref(card("all-minilm-l6-v2")).uri == "hg://sentence-transformers/all-MiniLM-L6-v2"


def test_later_mistral_models_have_no_window() -> None:
    assert config_of("mistral", "7b").attn_window_len == 4096
    for arch in ("7b_v0.2", "7b_v0.3", "nemo"):
        config = config_of("mistral", arch)
        assert (config.attn_window_len, config.rope_theta) == (None, 1e6)
