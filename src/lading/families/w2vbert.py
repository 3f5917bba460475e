"""w2v-BERT (https://arxiv.org/abs/2108.06209) for pre-training: wav2vec 2.0 that also predicts the masked frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lading.families import wav2vec2
from lading.families.name_rules import also_wrapped
from lading.families.nn.shapes import Shapes, projection, under
from lading.families.nn.speech_spec import speech_plan
from lading.families.w2vbert_config import W2VBertConfig as W2VBertConfig
from lading.families.w2vbert_config import check
from lading.families.wav2vec2_config import pretraining_spec
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.planning.rules import Rule
from lading.system.deferred import deferred, deferred_call

if TYPE_CHECKING:
    from lading.families.nn.w2vbert import W2VBert as W2VBert
    from lading.families.nn.w2vbert import W2VBertLoss as W2VBertLoss
    from lading.families.nn.w2vbert import W2VBertOutput as W2VBertOutput
else:
    __getattr__ = deferred(
        globals(),
        W2VBert="lading.families.nn.w2vbert",
        W2VBertOutput="lading.families.nn.w2vbert",
        W2VBertLoss="lading.families.nn.w2vbert",
    )


def _shapes(config: W2VBertConfig) -> Shapes:
    check(config)
    encoder = config.w2v2_config.encoder_config
    entries = config.w2v2_config.num_codebook_entries * config.num_target_codebooks

    return {
        **under("w2v2_model", wav2vec2.shapes(config.w2v2_config)),
        **projection("final_bert_proj", encoder.model_dim, entries),
    }


def _rules(config: W2VBertConfig) -> Sequence[Rule]:
    return also_wrapped(
        (
            Rule("mlm_proj.{p*}", "final_bert_proj.{p}"),  # fairseq
            Rule("final_bert_proj.{p*}", "final_bert_proj.{p}"),
            *(Rule(f"{part}.{{p*}}", f"w2v2_model.{part}.{{p}}") for part in ("project_q", "quantizer.weight_proj")),
            *_inside(wav2vec2.rules(config.w2v2_config)),
        )
    )


def _inside(rules: Sequence[Rule]) -> Iterator[Rule]:
    """Yield rules for the wav2vec 2.0 model: fairseq2's names have a prefix, fairseq's do not."""
    for rule in rules:
        target = None if rule.target is None else f"w2v2_model.{rule.target}"
        yield replace(rule, source=f"w2v2_model.{rule.source}", target=target)
        yield replace(rule, target=target)


FAMILY: Family[W2VBert, W2VBertConfig] = Family(
    name="w2vbert",
    kls="lading.families.nn.w2vbert:W2VBert",
    config_kls=W2VBertConfig,
    build=deferred_call("lading.families.nn.w2vbert:W2VBert"),
    init=deferred_call("lading.families.nn.w2vbert:init_w2vbert"),
    shapes=_shapes,
    rules=_rules,
    parallel_plan=lambda config: speech_plan(pretraining_spec(config.w2v2_config), "w2v2_model.wav2vec2"),
)

get_w2vbert_model_hub: ModelHubAccessor[W2VBert, W2VBertConfig] = ModelHubAccessor("w2vbert", FAMILY.kls, W2VBertConfig)
