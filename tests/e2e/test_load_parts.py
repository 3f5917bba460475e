"""LLaMA as Meta publishes it and as fairseq2 saves it: cut by ranks, in another layout; loaded by any gangs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor
from torch.distributed.tensor import DTensor

from lading import convert_checkpoint, import_cards, load_model
from lading.errors import DigestMismatchError, ModelCheckpointMismatchError
from lading.families.llama import LLaMAConfig, get_llama_model_hub
from lading.families.mistral import MistralConfig, get_mistral_model_hub
from lading.gangs import simulate_gangs
from lading.models.targets import targets_of

CONFIG = LLaMAConfig(
    model_dim=24,
    max_seq_len=64,
    vocab_size=40,
    num_layers=2,
    num_attn_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    ffn_inner_dim=20,
    ffn_inner_dim_scale=1.0,
    ffn_inner_dim_multiple_of=1,
)

State = dict[str, Tensor]

META = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
FAIRSEQ2 = {
    "tok_embeddings.weight": "decoder_frontend.embed.weight",
    "norm.weight": "decoder.layer_norm.weight",
    "output.weight": "final_proj.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.output_proj.weight",
    "attention_norm.weight": "self_attn_layer_norm.weight",
    "feed_forward.w1.weight": "ffn.gate_proj.weight",
    "feed_forward.w2.weight": "ffn.output_proj.weight",
    "feed_forward.w3.weight": "ffn.inner_proj.weight",
    "ffn_norm.weight": "ffn_layer_norm.weight",
}
CUT_DIMS = {"wo": 1, "w2": 1, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0}


def _states() -> tuple[State, State]:
    """The same weights, with Meta's names in Meta's layout, and with Hugging Face's."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    c = CONFIG
    q, kv = 4 * 12, 2 * 12
    meta = {
        "tok_embeddings.weight": random(c.vocab_size, c.model_dim),
        "norm.weight": random(c.model_dim),
        "output.weight": random(c.vocab_size, c.model_dim),
    }
    for n in range(c.num_layers):
        meta |= {
            f"layers.{n}.attention.wq.weight": random(q, c.model_dim),
            f"layers.{n}.attention.wk.weight": random(kv, c.model_dim),
            f"layers.{n}.attention.wv.weight": random(kv, c.model_dim),
            f"layers.{n}.attention.wo.weight": random(c.model_dim, q),
            f"layers.{n}.attention_norm.weight": random(c.model_dim),
            f"layers.{n}.feed_forward.w1.weight": random(c.ffn_inner_dim, c.model_dim),
            f"layers.{n}.feed_forward.w2.weight": random(c.model_dim, c.ffn_inner_dim),
            f"layers.{n}.feed_forward.w3.weight": random(c.ffn_inner_dim, c.model_dim),
            f"layers.{n}.ffn_norm.weight": random(c.model_dim),
        }

    def permute(w: Tensor, heads: int) -> Tensor:
        return w.view(heads, w.shape[0] // heads // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

    hugging_face = {}
    for name, value in meta.items():
        head, _, rest = name.partition(".attention.") if "attention." in name else ("", "", name)
        if rest.startswith(("wq", "wk")) and head:
            value = permute(value, 4 if rest.startswith("wq") else 2)
        hugging_face[_renamed(name, META, "model.layers")] = value
    return meta, hugging_face


def _renamed(name: str, names: dict[str, str], layers: str) -> str:
    if name in names:
        return names[name]
    _, n, rest = name.split(".", 2)
    return f"{layers}.{n}.{names[rest]}"


def _cut_dim(name: str, embed_dim: int) -> int | None:
    if name.startswith("tok_embeddings"):
        return embed_dim
    return CUT_DIMS.get(name.split(".")[-2])


def _consolidated(folder: Path, meta: State, size: int, embed_dim: int = 1) -> Path:
    folder.mkdir()
    for rank in range(size):
        part = {"rope.freqs": torch.ones(6)}
        for name, value in meta.items():
            dim = _cut_dim(name, embed_dim)
            part[name] = value if dim is None else value.chunk(size, dim)[rank].clone()
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    return folder


def _fairseq2(folder: Path, meta: State, tp: int, sdp: int) -> Path:
    """As fairseq2 saves it: ``tp`` first, then FSDP along the first dim, where late ranks may have nothing."""
    for i in range(tp):
        for j in range(sdp):
            part = {}
            for name, value in meta.items():
                dim = _cut_dim(name, 1)
                rows = (value if dim is None else value.chunk(tp, dim)[i]).chunk(sdp)
                # What FSDP1 leaves to a rank that has no row.
                mine = rows[j].clone() if j < len(rows) else torch.Tensor([])
                if mine.numel() or i == 0:
                    part[_renamed(name, FAIRSEQ2, "decoder.layers")] = mine
            path = folder / "pp_00" / f"tp_{i:02}" / f"sdp_{j:02}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"model": part, "fs2": True}, path)
    return folder


@pytest.fixture(scope="module")
def states() -> tuple[State, State]:
    return _states()


def _file(folder: Path, meta: State) -> Path:
    folder.mkdir()
    path = folder / "model.pt"
    torch.save({"model": {_renamed(name, FAIRSEQ2, "decoder.layers"): v for name, v in meta.items()}}, path)
    return path


KINDS: dict[str, Callable[[Path, State], Path]] = {
    "one shard": lambda folder, meta: _consolidated(folder, meta, 1),
    "two shards": lambda folder, meta: _consolidated(folder, meta, 2),
    "two shards of symbols": lambda folder, meta: _consolidated(folder, meta, 2, embed_dim=0),
    "fairseq2, one file": _file,
    "fairseq2, tp": lambda folder, meta: _fairseq2(folder, meta, 2, 1),
    "fairseq2, sdp": lambda folder, meta: _fairseq2(folder, meta, 1, 5),
    "fairseq2, tp and sdp": lambda folder, meta: _fairseq2(folder, meta, 2, 3),
}


@pytest.fixture(scope="module", params=KINDS)
def path(request: Any, states: tuple[State, State], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp("parts") / "model", states[0])


@pytest.mark.few(10)
@pytest.mark.parametrize(("dtype", "mmap"), [("auto", False), ("auto", True), (torch.float32, False)])
def test_the_whole_model(path: Path, states: tuple[State, State], dtype: Any, mmap: bool) -> None:
    model = get_llama_model_hub().load_custom_model(path, CONFIG, dtype=dtype, mmap=mmap)

    found = model.state_dict()
    assert found.keys() == states[1].keys()
    for name, value in states[1].items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


@pytest.mark.few(10)
@pytest.mark.parametrize(
    ("rank", "sizes"), [(1, {"tp": 2}), (1, {"sdp": 5}), (4, {"sdp": 7}), (5, {"tp": 2, "sdp": 3})], ids=str
)
def test_a_rank_of_any_gangs(path: Path, states: tuple[State, State], rank: int, sizes: dict[str, int]) -> None:
    """Five and seven ranks cut through heads of 12 rows."""
    with simulate_gangs(rank, **sizes) as gangs:
        model = get_llama_model_hub().load_custom_model(path, CONFIG, gangs=gangs, dtype=torch.bfloat16)

    targets = targets_of(model, dtype=None)
    for name, box in zip(targets.names, targets.boxes, strict=True):
        parameter = model.get_parameter(name)
        assert isinstance(parameter, DTensor)
        expected = states[1][name][tuple(map(slice, box.starts, box.ends))]
        assert torch.equal(parameter.to_local(), expected), name


@pytest.mark.few(3)
def test_one_tensor_after_another(path: Path, states: tuple[State, State]) -> None:
    found = dict(get_llama_model_hub().iter_checkpoint(path, CONFIG))

    assert found.keys() == states[1].keys()
    assert all(torch.equal(found[name], value) for name, value in states[1].items())


@pytest.mark.few(3)
def test_as_a_hugging_face_repository(path: Path, states: tuple[State, State], tmp_path: Path, catalog: Path) -> None:
    (tmp_path / "cards.yaml").write_text(ARCHITECTURE)
    import_cards(tmp_path / "cards.yaml")
    report = convert_checkpoint(path, tmp_path / "out", arch="llama/tiny", shard_size=8000, progress=False)

    assert len(report.files) > 3
    found = load_model(tmp_path / "out", dtype="auto").state_dict()
    assert found.keys() == states[1].keys()
    assert all(torch.equal(found[name], value) for name, value in states[1].items())


ARCHITECTURE = """
architecture: tiny
family: llama
config: {model_dim: 24, max_seq_len: 64, vocab_size: 40, num_layers: 2, num_attn_heads: 4, num_key_value_heads: 2,
         head_dim: 12, ffn_inner_dim: 20, ffn_inner_dim_scale: 1.0, ffn_inner_dim_multiple_of: 1}
"""

CARD = """
name: tiny_meta
model_family: llama
model_config: {model_dim: 24, max_seq_len: 64, vocab_size: 40, num_layers: 2, num_attn_heads: 4, num_key_value_heads: 2,
               head_dim: 12, ffn_inner_dim: 20, ffn_inner_dim_scale: 1.0, ffn_inner_dim_multiple_of: 1}
checkpoint: meta
"""


def test_a_card_is_verified(
    cards: Path, cli: Callable[..., Result], tmp_path: Path, states: tuple[State, State]
) -> None:
    """No parameter holds a tensor's bytes as they are in the file: digests are of the file's tensors all the same."""
    folder = _consolidated(tmp_path / "meta", states[0], 2)
    (tmp_path / "meta.yaml").write_text(CARD)
    cli("import", tmp_path / "meta.yaml")

    for verify in ("auto", "always"):
        model = load_model("tiny_meta", dtype="auto", verify=verify)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in states[1].items())
    cli("check", "tiny_meta")
    convert_checkpoint("tiny_meta", tmp_path / "out", verify="always", progress=False)
    written = load_model(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(written[name], value) for name, value in states[1].items())

    file = folder / "consolidated.01.pth"
    data = bytearray(file.read_bytes())
    at = data.index(states[0]["output.weight"].chunk(2)[1].view(torch.uint8).numpy().tobytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(DigestMismatchError, match=r"output\.weight#1"):
        load_model("tiny_meta", dtype="auto")
    with pytest.raises(DigestMismatchError, match=r"output\.weight#1"):
        convert_checkpoint("tiny_meta", tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


def test_a_part_that_is_missing(tmp_path: Path, states: tuple[State, State]) -> None:
    folder = _consolidated(tmp_path / "model", states[0], 2)
    part = torch.load(folder / "consolidated.00.pth", weights_only=True)
    del part["layers.1.attention.wq.weight"]
    torch.save(part, folder / "consolidated.00.pth")

    with pytest.raises(ModelCheckpointMismatchError, match=r"(?s)1 problem.*incomplete: .*number 0 is missing"):
        get_llama_model_hub().load_custom_model(folder, CONFIG)
    with pytest.raises(ModelCheckpointMismatchError, match="number 0 is missing"):
        list(get_llama_model_hub().iter_checkpoint(folder, CONFIG))


def test_parts_of_another_model(tmp_path: Path, states: tuple[State, State]) -> None:
    folder = _consolidated(tmp_path / "model", states[0] | {"output.weight": torch.ones(40, 26)}, 2)

    with pytest.raises(ModelCheckpointMismatchError, match=r"mis-shaped: output\.weight#0.* \[40, 24\], but is \["):
        get_llama_model_hub().load_custom_model(folder, CONFIG)


def test_mistral_has_the_same_names(tmp_path: Path, states: tuple[State, State]) -> None:
    config = MistralConfig(
        model_dim=24, max_seq_len=64, vocab_size=40, num_layers=2, num_attn_heads=4, num_key_value_heads=2, head_dim=12,
        ffn_inner_dim=20,
    )  # fmt: skip
    folder = _consolidated(tmp_path / "model", states[0], 1)
    model = get_mistral_model_hub().load_custom_model(folder, config, dtype="auto")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in states[1].items())
