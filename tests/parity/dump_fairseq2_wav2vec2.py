"""Write tiny random wav2vec 2.0 and w2v-BERT models of fairseq2 to a folder: parameters, an input and what comes out.

Run it where fairseq2 0.8.1 is installed::

    python tests/parity/dump_fairseq2_wav2vec2.py tests/parity/fairseq2_wav2vec2
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from fairseq2.models.transformer import TransformerNormOrder
from fairseq2.models.w2vbert import (
    W2VBertConfig,
    convert_w2vbert_state_dict,
    create_w2vbert_model,
)
from fairseq2.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2EncoderConfig
from fairseq2.models.wav2vec2.asr.config import Wav2Vec2AsrConfig
from fairseq2.models.wav2vec2.asr.factory import create_wav2vec2_asr_model
from fairseq2.models.wav2vec2.asr.interop import convert_wav2vec2_asr_state_dict
from fairseq2.models.wav2vec2.factory import create_wav2vec2_model
from fairseq2.nn import BatchLayout
from safetensors.torch import save_file
from torch import Tensor

PRE, POST = TransformerNormOrder.PRE, TransformerNormOrder.POST
LV60K: dict[str, Any] = {
    "layer_norm_features": False,
    "feature_extractor_bias": True,
    "feature_extractor_layer_norm_convs": True,
    "norm_order": PRE,
}
CONFORMER: dict[str, Any] = {"use_conformer": True, "depthwise_conv_kernel_size": 3, "layer_drop_p": 0.0}
FBANK: dict[str, Any] = {"use_fbank": True, "num_fbank_channels": 3, "fbank_stride": 2, "feature_dim": 6}

CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "asr-base": (Wav2Vec2AsrConfig, {}),
    "asr-lv60k": (Wav2Vec2AsrConfig, LV60K),
    "asr-pre-with-both-norms": (Wav2Vec2AsrConfig, {"norm_order": PRE}),
    "asr-post-without-norm": (Wav2Vec2AsrConfig, {"layer_norm_features": False}),
    "asr-as-wide-as-its-frames": (Wav2Vec2AsrConfig, {"model_dim": 6, "num_pos_conv_groups": 3}),
    "asr-fbank": (Wav2Vec2AsrConfig, FBANK),
    "asr-stacked": (Wav2Vec2AsrConfig, {"pos_encoder_depth": 2, "pos_conv_kernel_size": 7}),
    "asr-relative": (Wav2Vec2AsrConfig, LV60K | {"pos_encoder_type": "relative"}),
    "asr-rotary": (Wav2Vec2AsrConfig, {"pos_encoder_type": "rotary"}),
    "asr-conformer": (Wav2Vec2AsrConfig, CONFORMER),
    "asr-conformer-relative": (Wav2Vec2AsrConfig, CONFORMER | {"pos_encoder_type": "relative"}),
    "asr-conformer-rotary": (Wav2Vec2AsrConfig, CONFORMER | {"pos_encoder_type": "rotary"}),
    "base": (Wav2Vec2Config, {}),
    "lv60k": (Wav2Vec2Config, LV60K),
    "w2vbert": (
        W2VBertConfig,
        FBANK | CONFORMER | {"pos_encoder_type": "relative", "layer_norm_features": False, "num_encoder_layers": 3},
    ),
}


def encoder_config(values: dict[str, Any]) -> Wav2Vec2EncoderConfig:
    return Wav2Vec2EncoderConfig(
        **{
            "model_dim": 8,
            "feature_dim": 6,
            "feature_extractor_layer_descs": [(6, 10, 5), (6, 3, 2)],
            "pos_conv_kernel_size": 4,
            "num_pos_conv_groups": 2,
            "num_encoder_layers": 2,
            "num_encoder_attn_heads": 2,
            "ffn_inner_dim": 10,
            **values,
        }
    )


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.uniform_(-0.5, 0.5)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)


def run(config: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of a random model, and its inputs and outputs."""
    w2v2 = config.w2v2_config if isinstance(config, W2VBertConfig) else config
    fbank = w2v2.encoder_config.use_fbank
    lengths = [41, 28] if fbank else [230, 151]
    x = torch.randn(2, 41, 3) if fbank else torch.randn(2, 230)
    for row, n in enumerate(lengths):
        x[row, n:] = 0.0
    layout = BatchLayout.of(x, lengths)
    tensors = {"input_values": x, "lengths": torch.tensor(lengths)}

    if isinstance(config, Wav2Vec2AsrConfig):
        model = create_wav2vec2_asr_model(config).eval()
        randomise(model)
        logits, out_layout = model(x, layout)
        return model.state_dict(), tensors | {"logits": logits, "num_frames": out_layout.seq_lens_pt}

    whole = create_w2vbert_model(config) if isinstance(config, W2VBertConfig) else create_wav2vec2_model(config)
    randomise(whole.eval())
    model = whole.w2v2_model if isinstance(config, W2VBertConfig) else whole
    distractors: list[Tensor] = []

    def sample(targets: Tensor) -> Tensor:
        n, m, _ = targets.shape
        ids = (torch.arange(m)[None, :, None] + torch.randint(1, m, (n, m, w2v2.num_distractors))) % m
        distractors.append(ids)
        return torch.stack([targets[i, ids[i]] for i in range(n)])

    model._sample_distractors = sample
    if isinstance(config, W2VBertConfig):
        whole.compute_loss = lambda *args, **kwargs: None  # which fails: its cross-entropy wants the entries last
        _, bert = whole(x, layout)
        tensors |= {"bert_logits": bert.bert_logits, "bert_targets": bert.bert_targets}
        output = bert.w2v2_output
        loss = model.compute_loss(output)
    else:
        loss, output = model(x, layout)

    return whole.state_dict(), tensors | {
        "logits": output.logits,
        "targets": output.quantized_targets,
        "temporal_mask": output.temporal_mask,
        "distractors": distractors[0],
        "hidden": output.encoder_output,
        "raw_features": output.raw_features.contiguous(),
        "code_perplexity": output.quantizer_output.code_perplexity,
        "prob_perplexity": output.quantizer_output.prob_perplexity,
        "contrastive_loss": loss.contrastive,
        "diversity_loss": loss.diversity,
        "features_penalty": loss.features_penalty,
        "aggregate_loss": loss.aggregate,
    }


def fairseq_names_of_w2vbert(config: W2VBertConfig) -> dict[str, str]:
    """Names of fairseq's checkpoints → those to which fairseq2 converts them."""
    names = ["mask_emb", "quantizer.vars"]
    names += [
        f"{part}.{kind}"
        for part in ("post_extract_proj", "layer_norm", "quantizer.weight_proj", "final_proj", "project_q", "mlm_proj")
        for kind in ("weight", "bias")
    ]
    for i in range(config.w2v2_config.encoder_config.num_encoder_layers):
        layer = f"encoder.layers.{i}"
        parts = [f"ffn{n}.{part}" for n in (1, 2) for part in ("layer_norm", "w_1", "w_2")]
        parts += [f"self_attn.linear_{part}" for part in ("q", "k", "v", "out")]
        parts += ["self_attn_layer_norm", "conv_module.layer_norm", "conv_module.batch_norm", "final_layer_norm"]
        names += [f"{layer}.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
        names += [f"{layer}.self_attn.{name}" for name in ("linear_pos.weight", "pos_bias_u", "pos_bias_v")]
        convolutions = ("pointwise_conv1", "depthwise_conv", "pointwise_conv2")
        names += [f"{layer}.conv_module.{name}.weight" for name in convolutions]
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        names += [f"{layer}.conv_module.batch_norm.{name}" for name in buffers]

    converted = convert_w2vbert_state_dict({name: name for name in names}, config)
    assert set(converted) == set(create_w2vbert_model(config).state_dict())

    return {str(fairseq): fairseq2 for fairseq2, fairseq in converted.items() if isinstance(fairseq, str)}


def fairseq_names(config: Wav2Vec2AsrConfig) -> dict[str, str]:
    """Names of fairseq's checkpoints → those to which fairseq2 converts them."""
    encoder = config.encoder_config
    names = ["mask_emb", "post_extract_proj.weight", "post_extract_proj.bias", "layer_norm.weight", "layer_norm.bias"]
    names += [f"encoder.pos_conv.0.{name}" for name in ("bias", "weight_g", "weight_v")]
    names += [f"encoder.layer_norm.{name}" for name in ("weight", "bias")]
    for i, _ in enumerate(encoder.feature_extractor_layer_descs):
        conv = f"feature_extractor.conv_layers.{i}"
        names.append(f"{conv}.0.weight")
        if encoder.feature_extractor_bias:
            names.append(f"{conv}.0.bias")
        norm = "2.1" if encoder.feature_extractor_layer_norm_convs else "2"
        if norm == "2.1" or i == 0:
            names += [f"{conv}.{norm}.weight", f"{conv}.{norm}.bias"]
    for i in range(encoder.num_encoder_layers):
        parts = [f"self_attn.{name}_proj" for name in "kvq"]
        parts += ["self_attn.out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"]
        names += [f"encoder.layers.{i}.{part}.{kind}" for part in parts for kind in ("weight", "bias")]

    whole = [f"w2v_encoder.w2v_model.{name}" for name in names] + ["w2v_encoder.proj.weight", "w2v_encoder.proj.bias"]
    converted = convert_wav2vec2_asr_state_dict({name: name for name in whole}, config)
    assert set(converted) == set(create_wav2vec2_asr_model(config).state_dict())

    return {str(fairseq): fairseq2 for fairseq2, fairseq in converted.items()}


def main(folder: Path) -> None:
    torch.compiler.set_stance("force_eager")
    folder.mkdir(exist_ok=True)

    for name, (kls, values) in CASES.items():
        torch.manual_seed(len(name))
        if kls is W2VBertConfig:
            config = W2VBertConfig(w2v2_config=Wav2Vec2Config(encoder_config=encoder_config(values)))
            config.num_bert_encoder_layers, config.num_target_codebooks = 1, 2
        else:
            config = kls(encoder_config=encoder_config(values))
        if kls is Wav2Vec2AsrConfig:
            config.target_vocab_size = 5
        else:
            w2v2 = config.w2v2_config if kls is W2VBertConfig else config
            w2v2.final_dim, w2v2.quantized_dim, w2v2.num_codebook_entries, w2v2.num_distractors = 6, 4, 5, 7
            w2v2.temporal_mask_span_len = 4

        with torch.no_grad():
            state, tensors = run(config)
        fields = json.dumps(asdict(config), default=lambda value: value.name if isinstance(value, Enum) else value)
        metadata = {"config": fields}
        if name in ("asr-base", "asr-lv60k"):
            metadata["fairseq"] = json.dumps(fairseq_names(config))
        if name == "w2vbert":
            metadata["fairseq"] = json.dumps(fairseq_names_of_w2vbert(config))
        tensors = {f"test.{key}": value for key, value in tensors.items()}
        save_file(
            {key: value.contiguous() for key, value in (state | tensors).items()},
            folder / f"{name}.safetensors",
            metadata,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
