"""BERT (https://arxiv.org/abs/1810.04805), and the sentence encoders based on it (https://arxiv.org/abs/1908.10084)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lading.families.bert_config import BertConfig as BertConfig
from lading.families.bert_config import checked
from lading.families.config_json import CHANGES_EACH_MODEL, ConfigReader, ConfigTable, Field
from lading.families.name_rules import HEAD
from lading.families.nn.shapes import Shapes, norm, projection, under
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.models.parallel_plan import ParallelPlan, Split
from lading.planning.rules import Rule
from lading.system.deferred import deferred, deferred_call

if TYPE_CHECKING:
    from lading.families.nn.bert import Bert as Bert
else:
    __getattr__ = deferred(globals(), Bert="lading.families.nn.bert")


def _shapes(config: BertConfig) -> Shapes:
    checked(config)
    dim, inner = config.model_dim, config.ffn_inner_dim
    layer = {
        **projection("attention.self.query", dim, dim),
        **projection("attention.self.key", dim, dim),
        **projection("attention.self.value", dim, dim),
        **projection("attention.output.dense", dim, dim),
        **norm("attention.output.LayerNorm", dim),
        **projection("intermediate.dense", dim, inner),
        **projection("output.dense", inner, dim),
        **norm("output.LayerNorm", dim),
    }
    found: Shapes = {
        "embeddings.word_embeddings.weight": (config.vocab_size, dim),
        "embeddings.position_embeddings.weight": (config.max_seq_len, dim),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, dim),
        **norm("embeddings.LayerNorm", dim),
    }
    for i in range(config.num_layers):
        found |= under(f"encoder.layer.{i}", layer)

    return found | (projection("pooler.dense", dim, dim) if config.pooler else {})


def _plan(config: BertConfig) -> ParallelPlan:
    """Split attention by heads, feed-forward networks by their inner width, and the embedding of words by symbols."""
    return ParallelPlan(
        tensor={
            "embeddings.word_embeddings": Split.VOCABULARY,
            "embeddings.position_embeddings": Split.REPLICATED,
            "embeddings.token_type_embeddings": Split.REPLICATED,
            "embeddings.LayerNorm": Split.REPLICATED,
            "encoder.layer.*.attention.self.query": Split.COLUMN,
            "encoder.layer.*.attention.self.key": Split.COLUMN,
            "encoder.layer.*.attention.self.value": Split.COLUMN,
            "encoder.layer.*.attention.output.dense": Split.ROW,
            "encoder.layer.*.attention.output.LayerNorm": Split.REPLICATED,
            "encoder.layer.*.intermediate.dense": Split.COLUMN,
            "encoder.layer.*.output.dense": Split.ROW,
            "encoder.layer.*.output.LayerNorm": Split.REPLICATED,
            "pooler.dense": Split.REPLICATED,
        },
        divisible={"num_attn_heads": config.num_attn_heads, "ffn_inner_dim": config.ffn_inner_dim},
        units=("encoder.layer.*", "pooler"),
    )


def _rules(config: BertConfig) -> Sequence[Rule]:
    rules = [
        Rule("cls.{rest*}", None),  # the heads of pre-training
    ]
    for prefix in ("bert.", ""):
        rules += [
            Rule(f"{prefix}embeddings.position_ids", None, computed=True),  # saved by old versions of transformers
            # The names in the first release, converted from TensorFlow.
            Rule(f"{prefix}{{rest*}}LayerNorm.gamma", "{rest}LayerNorm.weight"),
            Rule(f"{prefix}{{rest*}}LayerNorm.beta", "{rest}LayerNorm.bias"),
        ]
        if not config.pooler:
            rules.append(Rule(f"{prefix}pooler.{{rest*}}", None))

    return (*rules, Rule("bert.{rest*}", "{rest}"))


_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


CONFIG_JSON = ConfigTable(
    family="bert",
    model_type="bert",
    architecture="BertModel",
    config_kls=BertConfig,
    spec=checked,
    free=("pooling", "normalize", "pooler"),
    entries=(
        Field("model_dim", "hidden_size", ConfigReader.count, 768),
        Field("max_seq_len", "max_position_embeddings", ConfigReader.count, 512),
        Field("vocab_size", "vocab_size", ConfigReader.count, 30_522),
        Field("type_vocab_size", "type_vocab_size", ConfigReader.count, 2),
        Field("pad_idx", "pad_token_id", ConfigReader.index, 0),
        Field("num_layers", "num_hidden_layers", ConfigReader.layers, 12),
        Field("num_attn_heads", "num_attention_heads", ConfigReader.count, 12),
        Field("ffn_inner_dim", "intermediate_size", ConfigReader.count, 3072),
        Field(
            "ffn_activation",
            "hidden_act",
            lambda keys, key, default: keys.choice(key, default, _ACTIVATIONS),
            "gelu",
            write=lambda config: {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.ffn_activation],
        ),
        Field("norm_eps", "layer_norm_eps", ConfigReader.number, 1e-12),
        Field("dropout_p", "hidden_dropout_prob", ConfigReader.number, 0.1),
        Field("attn_dropout_p", "attention_probs_dropout_prob", ConfigReader.number, 0.1),
        Field("init_std", "initializer_range", ConfigReader.number, 0.02),
    ),
    required={
        **CHANGES_EACH_MODEL,
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
    },
    ignored={
        "tie_word_embeddings": "only for the head of masked language modeling, which is not loaded",
        "is_causal": "only a decoder reads it",
        "gradient_checkpointing": "training",
        "directionality": "historical; each published file has it",
        "pooler_fc_size": "of the first release; transformers does not read it",
        "pooler_num_attention_heads": "of the first release; transformers does not read it",
        "pooler_num_fc_layers": "of the first release; transformers does not read it",
        "pooler_size_per_head": "of the first release; transformers does not read it",
        "pooler_type": "of the first release; transformers does not read it",
    },
)
"""The keys of ``config.json``, which does not say how sentences are embedded: files of sentence-transformers do."""


def _explain(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """Return advice for a checkpoint without a pooler, or with the head of a task."""
    if unexpected and all(HEAD.fullmatch(name) for name in unexpected):
        return (
            "The checkpoint has the head of a task. Load it with `get_hg_model_hub().load_model(…)`, or set "
            "`model_family: hg` in its card."
        )
    if not unexpected and missing and all(name.startswith("pooler.") for name in missing):
        return (
            "The checkpoint has no pooler. Set `pooler: false` in the `model_config` of the card, or load it with "
            "`load_custom_model` and such a configuration, or with its transformers class by "
            "`get_hg_model_hub().load_model(…)`."
        )

    return None


FAMILY: Family[Bert, BertConfig] = Family(
    name="bert",
    kls="lading.families.nn.bert:Bert",
    config_kls=BertConfig,
    build=deferred_call("lading.families.nn.bert:Bert"),
    init=deferred_call("lading.families.nn.bert:init_bert"),
    shapes=_shapes,
    rules=_rules,
    parallel_plan=_plan,
    hf_model_types=frozenset({"bert"}),
    from_hf=CONFIG_JSON.read,
    hf_stated=CONFIG_JSON.stated,
    to_hf=CONFIG_JSON.write,
    explain=_explain,
)

get_bert_model_hub: ModelHubAccessor[Bert, BertConfig] = ModelHubAccessor("bert", FAMILY.kls, BertConfig)
