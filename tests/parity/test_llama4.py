"""Llama 4 in other forms than that of the text model: the decoder of a multimodal one, and Meta's files."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lading import NotSupportedError, check_model, import_cards, load_model, plan_load
from lading.families.llama4 import CONFIG_JSON, FAMILY, Llama4, get_llama4_model_hub
from lading.formats import index
from lading.models.fit import check_manifest
from tests.helpers.parity_tools import randomise, relative_difference

TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 40, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 3,
    "interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "attention_chunk_size": 5, "floor_scale": 4,
    "attn_scale": 0.5, "max_position_embeddings": 128,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "vision_output_dim": 8, "projector_input_dim": 8, "projector_output_dim": 8,
    "pixel_shuffle_ratio": 1.0,
}  # fmt: skip

CARD = """\
name: tiny_llama4
model_family: llama4
model_config: {model_dim: 32, max_seq_len: 128, vocab_size: 64, num_layers: 4, num_attn_heads: 4,
  num_key_value_heads: 2, ffn_inner_dim: 40, ffn_inner_dim_scale: 1.0, ffn_inner_dim_multiple_of: 1,
  rope_theta: 500000.0, use_qk_norm: true, nope_layer_interval: 2, attention_chunk_size: 5,
  attn_temperature_floor: 4, attn_temperature_scale: 0.5,
  experts: {num_experts: 3, interleave_moe_layer_step: 2, inner_dim: 24}}
checkpoint: ./model
"""
TOKENS = torch.arange(26).view(2, 13) % 64


@pytest.fixture
def theirs(tmp_path: Path, home: Path) -> Any:
    """A multimodal model of random weights, which is saved to ``model``."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Llama4Config(text_config=TEXT, vision_config=VISION)
    model: Any = transformers.Llama4ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    randomise(model)
    model.save_pretrained(tmp_path / "model")

    return model


@torch.no_grad()
def compare(model: torch.nn.Module, theirs: Any) -> None:
    assert isinstance(model, Llama4)
    assert relative_difference(model.eval()(TOKENS), theirs(TOKENS).logits) <= 1e-5


def test_the_folder_of_a_multimodal_model(theirs: Any, tmp_path: Path) -> None:
    compare(get_llama4_model_hub().load_model(tmp_path / "model", progress=False), theirs)


def test_a_card_of_a_multimodal_model_says_what_is_left_out(theirs: Any, tmp_path: Path) -> None:
    (tmp_path / "cards.yaml").write_text(CARD)
    import_cards(tmp_path / "cards.yaml")

    compare(load_model("tiny_llama4", progress=False), theirs)
    report = check_model("tiny_llama4")
    assert report.fits
    assert not report.contradictions
    beside = {name for name in load_file(tmp_path / "model" / "model.safetensors") if "language_model" not in name}
    assert set(report.dropped) == beside != set()


def test_an_error_in_its_part_of_the_file_says_where(theirs: Any, tmp_path: Path) -> None:
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    values["text_config"]["moe_layers"] = [0, 3]
    file.write_text(json.dumps(values))

    with pytest.raises(NotSupportedError, match=r"text_config\.moe_layers"):
        get_llama4_model_hub().load_model(tmp_path / "model")


def files_of_meta(state: dict[str, Tensor], ranks: int) -> list[dict[str, Any]]:
    """The tensors of transformers, as Meta's ranks of tensor parallelism hold them."""
    found: list[dict[str, Any]] = []
    for rank in range(ranks):

        def own(name: str, dim: int, rank: int = rank) -> Tensor:
            return state[name].chunk(ranks, dim)[rank]

        part = {
            "tok_embeddings.weight": own("model.embed_tokens.weight", 0),
            "output.weight": own("lm_head.weight", 0),
            "norm.weight": state["model.norm.weight"],
            "rope.freqs": torch.ones(4),
            "vision_embeddings.vision_encoder.class_embedding": torch.ones(4),
            "vision_projection.weight": torch.ones(4, 2),
        }
        for i in range(TEXT["num_hidden_layers"]):
            theirs, meta = f"model.layers.{i}", f"layers.{i}"
            attention, ffn = f"{theirs}.self_attn", f"{theirs}.feed_forward"
            norm = state[f"{theirs}.post_attention_layernorm.weight"]
            part |= {
                f"{meta}.attention.wqkv.weight": torch.cat([own(f"{attention}.{x}_proj.weight", 0) for x in "qkv"]),
                f"{meta}.attention.wqkv.layer_norm_weight": state[f"{theirs}.input_layernorm.weight"],
                f"{meta}.attention.wo.weight": own(f"{attention}.o_proj.weight", 1),
            }
            if f"{ffn}.router.weight" not in state:
                fused = torch.cat([own(f"{ffn}.{x}_proj.weight", 0) for x in ("gate", "up")])
                part |= {
                    f"{meta}.feed_forward.mlp.layer_norm_weight": norm,
                    f"{meta}.feed_forward.mlp.fc1_weight": fused,
                    f"{meta}.feed_forward.mlp.fc2_weight": own(f"{ffn}.down_proj.weight", 1),
                }
                continue
            gate, up = (x.chunk(ranks, 2)[rank] for x in state[f"{ffn}.experts.gate_up_proj"].chunk(2, 2))
            part |= {
                f"{meta}.feed_forward.norm.weight": norm,
                f"{meta}.feed_forward.router_DE": state[f"{ffn}.router.weight"].T.contiguous(),
                f"{meta}.feed_forward.global_gate_stats_3E": torch.ones(3, 3),
                f"{meta}.feed_forward.expert_activation_DE": torch.ones(32, 3),
                f"{meta}.feed_forward.experts.moe_w_in_eD_F": gate.flatten(0, 1),
                f"{meta}.feed_forward.experts.moe_w_swiglu_eD_F": up.flatten(0, 1),
                f"{meta}.feed_forward.experts.moe_w_out_eF_D": own(f"{ffn}.experts.down_proj", 1).flatten(0, 1),
                f"{meta}.feed_forward.w_in_shared_FD.weight": own(f"{ffn}.shared_expert.gate_proj.weight", 0),
                f"{meta}.feed_forward.w_swiglu_FD.weight": own(f"{ffn}.shared_expert.up_proj.weight", 0),
                f"{meta}.feed_forward.w_out_shared_DF.weight": own(f"{ffn}.shared_expert.down_proj.weight", 1),
            }
        copies = {name: tensor.clone() for name, tensor in part.items()}
        found.append({**copies, "layers.0.attention.wqkv._extra_state": io.BytesIO(b"state")})

    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_files_of_meta(ranks: int, theirs: Any, tmp_path: Path) -> None:
    state = theirs.language_model.state_dict()
    folder = tmp_path / "meta"
    folder.mkdir()
    for rank, part in enumerate(files_of_meta(state, ranks)):
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    config = CONFIG_JSON.read(TEXT)

    model = get_llama4_model_hub().load_custom_model(folder, config, progress=False)

    report = check_manifest(index(folder), FAMILY, config)
    assert report.fits
    assert report.matched + len(report.dropped) == report.tensors
    assert {name.partition("#")[0] for name in report.dropped} >= {"rope.freqs", "vision_projection.weight"}
    own = model.state_dict()
    assert {name: torch.equal(own[name], tensor) for name, tensor in state.items()} == dict.fromkeys(state, True)
    compare(model, theirs)


def test_the_largest_model_is_planned_without_its_bytes(tmp_path: Path, home: Path) -> None:
    """In the names of the published multimodal model: a header, and a file that is as long, but holds nothing."""
    config = get_llama4_model_hub().get_arch_config("llama4_maverick_17b_128e")
    shapes: Any = FAMILY.shapes(config) if FAMILY.shapes is not None else {}
    header, end = {}, 0
    for name, shape in {**{f"language_model.{name}": s for name, s in shapes.items()}, "vision_model.x": (7,)}.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    data = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)
    card = {"model_family": "llama4", "model_arch": "llama4_maverick_17b_128e"}
    import_cards([{"name": "maverick", **card, "checkpoint": f"{tmp_path}/model.safetensors"}])

    plan = plan_load("maverick", tp=8, sdp=2, pp=4)

    assert plan.checkpoint_bytes == end > 800e9
    whole = [shape for name, shape in shapes.items() if "norm" in name or "router" in name]
    split = end - 14 - 2 * sum(map(math.prod, whole))
    own = [rank for rank in plan.ranks if rank.tp == 0]
    assert sum(rank.memory_bytes for rank in own) == split // 8 + 2 * sum(map(math.prod, whole))
    # Some columns of a matrix are read with the bytes between them.
    assert 1 <= sum(rank.bytes_read for rank in own) / sum(rank.memory_bytes for rank in own) < 1.1
