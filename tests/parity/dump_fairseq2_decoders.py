"""Write tiny random decoders of fairseq2 to a folder: parameters under its own names, tokens and logits.

Run it where fairseq2 0.8.1 is installed::

    python tests/parity/dump_fairseq2_decoders.py tests/parity/fairseq2_decoders
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fairseq2.models.gemma3n.config import Gemma3nAudioConfig, Gemma3nConfig
from fairseq2.models.gemma3n.factory import create_gemma3n_model
from fairseq2.models.llama import LLaMAConfig, LLaMARoPEScaleConfig
from fairseq2.models.llama.factory import create_llama_model
from fairseq2.models.llama4 import Llama4Config, create_llama4_model
from fairseq2.models.llama4.config import Llama4ExpertsConfig
from fairseq2.models.mistral import MistralConfig
from fairseq2.models.mistral.factory import create_mistral_model
from fairseq2.models.olmo import OLMOConfig
from fairseq2.models.olmo.config import YaRNScaleConfig
from fairseq2.models.olmo.factory import create_olmo_model
from fairseq2.models.qwen import QwenConfig
from fairseq2.models.qwen.factory import create_qwen_model
from fairseq2.nn import BatchLayout
from safetensors.torch import save_file

SIZES: dict[str, Any] = {
    "model_dim": 16, "max_seq_len": 32, "vocab_size": 13, "num_layers": 2, "num_attn_heads": 4,
    "num_key_value_heads": 2, "ffn_inner_dim": 12,
}  # fmt: skip
OLMO: dict[str, Any] = {**SIZES, "pad_idx": 0, "eos_token_id": 1}
LLAMA: dict[str, Any] = {**SIZES, "ffn_inner_dim_scale": 1.0, "ffn_inner_dim_multiplier": 1.0}
# Its mask of chunks hides nothing: without chunks, or where no layer has them.
LLAMA4: dict[str, Any] = {
    **LLAMA,
    "ffn_inner_dim_multiple_of": 4,
    "attention_chunk_size": 0,
    "experts": Llama4ExpertsConfig(num_experts=3),
}
# Layers 4, 9 and 10 have no window; 9 and 10 have the keys and values of 4, and 8 has those of 7. Ten are sparse, and
# so wide that some gates are far from their bound.
GEMMA3N: dict[str, Any] = {
    **SIZES, "num_layers": 11, "head_dim": 4, "ffn_inner_dim": 48, "altup_hidden_dim": 40, "sliding_window": 5,
    "num_kv_shared_layers": 3, "laurel_rank": 3, "vocab_size_per_layer_input": 13, "hidden_size_per_layer_input": 4,
}  # fmt: skip
AUDIO: dict[str, Any] = {
    "vocab_size": 5, "vocab_offset": 13, "input_feat_size": 8, "hidden_size": 8, "conf_num_hidden_layers": 1,
    "conf_num_attention_heads": 2, "sscp_conv_channel_size": (4, 2),
}  # fmt: skip
YARN = {"scale_factor": 4.0, "original_max_seq_len": 8}

STD = {"gemma3n": 0.2}
"""The deviation of weights, if another is better conditioned."""

CASES: dict[str, tuple[Any, Any]] = {
    "llama": (create_llama_model, lambda: LLaMAConfig(**LLAMA, ffn_inner_dim_multiple_of=4)),
    "llama-tied": (
        create_llama_model,
        lambda: LLaMAConfig(
            **LLAMA, ffn_inner_dim_multiple_of=4, tied_embeddings=True, shard_embed_dim=False, use_scaled_rope=True
        ),
    ),
    "mistral": (create_mistral_model, lambda: MistralConfig(**SIZES, attn_window_len=5)),
    "olmo-2": (create_olmo_model, lambda: OLMOConfig(**OLMO)),
    "olmo-2-tied": (create_olmo_model, lambda: OLMOConfig(**OLMO, tied_embeddings=True)),
    "olmo-3": (create_olmo_model, lambda: OLMOConfig(**{**OLMO, "num_layers": 4}, sliding_window=4)),
    "olmo-3-yarn": (
        create_olmo_model,
        lambda: OLMOConfig(**{**OLMO, "num_layers": 4}, sliding_window=4, yarn_scale_config=YaRNScaleConfig(**YARN)),
    ),
    "qwen-2": (create_qwen_model, lambda: QwenConfig(**SIZES)),
    "qwen-3": (create_qwen_model, lambda: QwenConfig(**SIZES, qkv_proj_bias=False, q_norm=True, k_norm=True)),
    "llama4": (create_llama4_model, lambda: Llama4Config(**LLAMA4, nope_layer_interval=2, use_qk_norm=True)),
    "llama4-interleaved": (
        create_llama4_model,
        lambda: Llama4Config(
            **{
                **LLAMA4,
                "ffn_inner_dim": 21,
                "ffn_inner_dim_multiplier": 1.2,
                "ffn_inner_dim_scale": 2 / 3,
                "experts": Llama4ExpertsConfig(num_experts=4, top_k=2, interleave_moe_layer_step=2),
            },
            use_scaled_rope=True,
            rope_scale=LLaMARoPEScaleConfig(factor=16.0, frequency_factors=(1.0, 1.0), original_context_length=16),
        ),
    ),
    "llama4-one-kind-of-experts": (
        create_llama4_model,
        lambda: Llama4Config(
            **{
                **LLAMA4,
                "attention_chunk_size": 3,
                "experts": Llama4ExpertsConfig(num_experts=2, use_shared_expert=False, capacity_factor=1.5),
            },
            nope_layer_interval=1,
        ),
    ),
    "gemma3n": (create_gemma3n_model, lambda: Gemma3nConfig(**GEMMA3N)),
    "gemma3n-with-audio": (
        create_gemma3n_model,
        lambda: Gemma3nConfig(
            **{**GEMMA3N, "num_layers": 5, "num_kv_shared_layers": 0, "altup_num_inputs": 2},
            audio_config=Gemma3nAudioConfig(**AUDIO),
        ),
    ),
}


def main(folder: Path) -> None:
    torch.compiler.set_stance("force_eager")
    folder.mkdir(exist_ok=True)

    for seed, (name, (create, config_of)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        config = config_of()
        model = create(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=STD.get(name, 0.5)) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
            tokens = torch.randint(2, SIZES["vocab_size"], (2, 14))
            logits = model(tokens, BatchLayout.of(tokens))
        save_file(
            {key: value.clone() for key, value in model.state_dict().items()}
            | {"test.tokens": tokens, "test.logits": logits},
            folder / f"{name}.safetensors",
            {"config": json.dumps(asdict(config))},
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
