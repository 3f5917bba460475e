"""Write tiny random NLLB models, S2T Transformers and Conformers of fairseq2: parameters, inputs and logits.

Run it where fairseq2 0.8.1 is installed::

    python tests/parity/dump_fairseq2_encoder_decoders.py tests/parity/fairseq2_encoder_decoders
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fairseq2.models.nllb.config import NllbConfig
from fairseq2.models.nllb.factory import create_nllb_model
from fairseq2.models.nllb.interop import convert_nllb_state_dict
from fairseq2.models.s2t_conformer.config import S2TConformerConfig
from fairseq2.models.s2t_conformer.factory import create_s2t_conformer_model
from fairseq2.models.s2t_conformer.interop import convert_s2t_conformer_state_dict
from fairseq2.models.s2t_transformer.config import S2TTransformerConfig
from fairseq2.models.s2t_transformer.factory import create_s2t_transformer_model
from fairseq2.models.s2t_transformer.interop import convert_s2t_transformer_state_dict
from fairseq2.nn import BatchLayout
from safetensors.torch import save_file
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "model_dim": 8,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "num_encoder_attn_heads": 4,
    "num_decoder_attn_heads": 2,
    "ffn_inner_dim": 12,
}
CASES: dict[str, tuple[Any, Any, Any]] = {
    "nllb": (
        NllbConfig(**SIZES, vocab_size=23, max_seq_len=16),
        create_nllb_model,
        convert_nllb_state_dict,
    ),
    **{
        name: (
            S2TConformerConfig(
                **SIZES,
                num_fbank_channels=3,
                target_vocab_size=23,
                max_source_seq_len=32,
                use_relative_pos=relative,
                depthwise_conv_kernel_size=5,
            ),
            create_s2t_conformer_model,
            convert_s2t_conformer_state_dict,
        )
        for name, relative in (("s2t_conformer", False), ("s2t_conformer-relative", True))
    },
    "s2t_transformer": (
        S2TTransformerConfig(**SIZES, num_fbank_channels=3, target_vocab_size=23),
        create_s2t_transformer_model,
        convert_s2t_transformer_state_dict,
    ),
}

FAIRSEQ = {
    "encoder_frontend.embed.": "encoder.embed_tokens.",
    "decoder_frontend.embed.": "decoder.embed_tokens.",
    "encoder_frontend.feature_extractor.layers.0.conv.": "encoder.subsample.conv_layers.0.",
    "encoder_frontend.feature_extractor.layers.1.conv.": "encoder.subsample.conv_layers.1.",
    "final_proj.": "decoder.output_projection.",
    "encoder_decoder_attn_layer_norm.": "encoder_attn_layer_norm.",
    "encoder_decoder_attn.": "encoder_attn.",
    "output_proj.": "out_proj.",
    "ffn.inner_proj.": "fc1.",
    "ffn.out_proj.": "fc2.",  # renamed to this by the entry before
    "ffn_layer_norm.": "final_layer_norm.",
}


CONFORMER = {
    "encoder_frontend.proj.": "encoder.linear.",
    "encoder.layers.": "encoder.conformer_layers.",
    "ffn1_layer_norm.": "ffn1.layer_norm.",
    "ffn2_layer_norm.": "ffn2.layer_norm.",
    ".inner_proj.": ".w_1.",
    "ffn1.output_proj.": "ffn1.w_2.",
    "ffn2.output_proj.": "ffn2.w_2.",
    ".q_proj.": ".linear_q.",
    ".k_proj.": ".linear_k.",
    ".v_proj.": ".linear_v.",
    ".output_proj.": ".linear_out.",
    "sdpa.r_proj.": "linear_pos.",
    "sdpa.u_bias": "pos_bias_u",
    "sdpa.v_bias": "pos_bias_v",
    ".conv.": ".conv_module.",
    "conv_layer_norm.": "conv_module.layer_norm.",
}


def fairseq_name(family: str, name: str) -> str:
    if family == "s2t_conformer" and name.startswith(("encoder.", "encoder_frontend.proj.")):
        name = re.sub(r"(layers\.[0-9]+\.)layer_norm\.", r"\1final_layer_norm.", name)
        for fairseq2, fairseq in CONFORMER.items():
            name = name.replace(fairseq2, fairseq)
        return name
    for fairseq2, fairseq in FAIRSEQ.items():
        if not (fairseq == "out_proj." and "output_projection" in name):
            name = name.replace(fairseq2, fairseq)
    if family == "s2t_transformer":
        name = name.replace("encoder.layers.", "encoder.transformer_layers.")

    return name


@torch.no_grad()
def randomise(model: nn.Module) -> None:
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


def inputs(family: str) -> tuple[Tensor, list[int], Tensor, list[int]]:
    """A source with its lengths, and a target with those of it; fairseq2 takes no padded filter banks."""
    target = torch.randint(4, 23, (2, 9))
    if family == "nllb":
        return torch.randint(4, 23, (2, 11)), [11, 6], target, [9, 5]

    return torch.randn(2, 39, 3), [39, 39], target, [9, 5]


@torch.no_grad()
def main(folder: Path) -> None:
    torch.compiler.set_stance("force_eager")
    folder.mkdir(exist_ok=True)

    for case, (config, create, convert) in CASES.items():
        family = case.partition("-")[0]
        torch.manual_seed(len(case))
        model = create(config).eval()
        randomise(model)
        small = family == "s2t_conformer"
        if small:
            for tensor in model.state_dict().values():
                tensor.copy_(tensor.half())  # so that the file can hold half the bytes
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        # Converted by fairseq2 itself, a checkpoint of fairseq gives the same model.
        names = {name: fairseq_name(family, name) for name in state}
        fairseq = {names[name]: tensor.clone() for name, tensor in state.items()}
        if family == "nllb":
            for name in ("encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection"):
                fairseq[f"{name}.weight"][[1, 3, 0, 2]] = state["final_proj.weight"][[0, 1, 2, 3]]
        converted = convert({name: tensor.clone() for name, tensor in fairseq.items()}, config)
        assert converted.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in converted.items())

        source, source_lengths, target, target_lengths = inputs(family)
        logits = model(source, BatchLayout.of(source, source_lengths), target, BatchLayout.of(target, target_lengths))
        test = {
            "source": source,
            "source_lengths": torch.tensor(source_lengths),
            "target": target,
            "target_lengths": torch.tensor(target_lengths),
            "logits": logits,
        }
        save_file(
            {
                name: tensor.contiguous().half() if small and tensor.is_floating_point() else tensor.contiguous()
                for name, tensor in state.items()
            }
            | {f"test.{name}": tensor.contiguous() for name, tensor in test.items()},
            folder / f"{case}.safetensors",
            {"config": json.dumps(asdict(config)), "fairseq": json.dumps(names)},
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
