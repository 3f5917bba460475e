"""What the stages of a pipeline compute one after the other is what one process computes, over real processes."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.nn import Module

from lading.errors import DigestMismatchError, GangError, ModelCheckpointMismatchError, NotSupportedError
from lading.gangs import Gangs, create_fake_gangs, create_gangs
from lading.models.construct import create_model
from lading.models.hf_config import family_of_folder
from lading.models.hub import load_model, load_with_report
from tests.distributed.tiny_models import far, save_model, whole
from tests.distributed.workers import Pool
from tests.helpers.make_checkpoint import make, qwen_card

Axes = dict[str, int]

GEMMA = {
    "hidden_size": 36,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "vocab_size": 101,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def staged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers

    root = tmp_path_factory.mktemp("staged")
    made = {"qwen": make(root / "qwen", shards=2)}
    for name, config, kls, sizes in (
        ("llama", transformers.LlamaConfig, transformers.LlamaForCausalLM, LLAMA),
        ("gemma", transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, GEMMA),
    ):
        values = config(num_hidden_layers=3, max_position_embeddings=64, **sizes)
        made[name] = save_model(root / name, kls, values)

    return made


def by_hand(stage: Module, gangs: Gangs, ids: Tensor, dim: int, **options: Tensor) -> Tensor | None:
    """What the last stage gives; the hidden states go from rank to rank."""
    pp = gangs.pp
    assert pp.mesh is not None
    group = pp.mesh.get_group()
    x = ids
    if pp.rank > 0:
        x = torch.empty(*ids.shape, dim)
        dist.recv(x, group=group, group_src=pp.rank - 1)
    with torch.no_grad():
        y: Tensor = stage(x, **options)
    if pp.rank == pp.size - 1:
        return y
    dist.send(y.contiguous(), group=group, group_dst=pp.rank + 1)
    return None


def loss(logits: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def differences(model: Any, alone: Any, gangs: Gangs) -> list[str]:
    """Everything in which this rank's stage differs from its part of a model of a single process."""
    found = []
    pp = gangs.pp
    is_last = pp.rank == pp.size - 1
    expected = dict(alone.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not torch.equal(whole(parameter.detach()), expected[name]):
            found.append(f"parameter {name}")
    layers = {int(name.split(".")[2]) for name in dict(model.named_parameters()) if ".layers." in name}
    if len(layers) == alone.spec.num_layers:
        found.append("it has all layers")

    ids = torch.randint(1, 90, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for options in ({}, {"attention_mask": mask}):
        logits = by_hand(model, gangs, ids, alone.spec.model_dim, **options)
        if logits is not None and far(logits, alone(ids, **options)):
            found.append(f"logits with {list(options)}")

    assert pp.mesh is not None
    stage = PipelineStage(model, pp.rank, pp.size, gangs.root.device, group=pp.mesh.get_group())
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss)
    logits = schedule.step(*([ids] if pp.rank == 0 else []), target=ids if is_last else None, attention_mask=mask)
    reference = alone(ids, attention_mask=mask)
    if is_last and far(logits, reference):
        found.append("logits of the schedule")

    # Each stage has the gradient of its own use of a tied table: both are told apart in a model that is not tied.
    if alone.lm_head.weight is alone.model.embed_tokens.weight:
        alone.lm_head.weight = torch.nn.Parameter(alone.lm_head.weight.detach().clone())
        reference = alone(ids, attention_mask=mask)
    loss(reference, ids).backward()
    expected = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = expected[name].grad
        if parameter.grad is None or gradient is None or far(whole(parameter.grad), gradient):
            found.append(f"gradient of {name}")

    return found


def load_and_compare(folder: Path, axes: Axes) -> list[str]:
    torch.set_num_threads(1)
    with warnings.catch_warnings(), create_gangs("cpu", **axes) as gangs:
        warnings.simplefilter("error")
        alone = load_model(folder, device="cpu", dtype=torch.float32, progress=False).eval()
        model, report = load_with_report(folder, gangs=gangs, dtype="auto", progress=False)
        held = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in model.parameters())
        # Between the columns of a row-wise linear lies what is read with them.
        assert report.bytes_read == held if gangs.tp.size == 1 else held <= report.bytes_read < 1.6 * held
        if report.dtypes.keys() != {"float32"}:
            model = load_model(folder, gangs=gangs, dtype=torch.float32, progress=False)

        return differences(model.eval(), alone, gangs)


def case_id(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(f"{axis}{size}" for axis, size in value.items())


@pytest.mark.parametrize("family", ["qwen", pytest.param("llama", marks=pytest.mark.slow), "gemma"])
def test_two_stages(pool2: Pool, staged: dict[str, Path], family: str) -> None:
    assert pool2.values(load_and_compare, staged[family], {"pp": 2}) == [[]] * 2


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("llama", {"pp": 2, "tp": 2}),
        ("gemma", {"pp": 2, "sdp": 2}),
        pytest.param("qwen", {"pp": 2, "tp": 2}, marks=pytest.mark.slow),
        pytest.param("llama", {"pp": 2}, marks=pytest.mark.slow),
    ],
    ids=case_id,
)
def test_four_ranks(pool4: Pool, staged: dict[str, Path], family: str, axes: Axes) -> None:
    assert pool4.values(load_and_compare, staged[family], axes) == [[]] * 4


@pytest.fixture(scope="module")
def pool8() -> Any:
    with Pool(8) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("llama", {"pp": 2, "tp": 2, "sdp": 2}),
        ("gemma", {"pp": 2, "tp": 2, "sdp": 2}),
        ("gemma", {"pp": 2, "sdp": 2}),
        ("qwen", {"pp": 2, "tp": 4}),
    ],
    ids=case_id,
)
def test_eight_ranks(pool8: Pool, staged: dict[str, Path], family: str, axes: Axes) -> None:
    assert pool8.values(load_and_compare, staged[family], axes, within=180) == [[]] * 8


def new_and_compare(folder: Path, axes: Axes) -> list[str]:
    torch.set_num_threads(1)
    family, config = family_of_folder(folder)
    torch.manual_seed(7)
    alone = create_model(family, config, gangs=create_fake_gangs("cpu"), dtype=torch.float32, meta=False).eval()
    torch.manual_seed(7 + int(os.environ["RANK"]))  # the first rank's seed counts
    with create_gangs("cpu", **axes) as gangs:
        model = create_model(family, config, gangs=gangs, dtype=torch.float32, meta=False).eval()

        return differences(model, alone, gangs)


def test_a_new_model(pool4: Pool, staged: dict[str, Path]) -> None:
    assert pool4.values(new_and_compare, staged["qwen"], {"pp": 2, "tp": 2}) == [[]] * 4


def load_in_stages(folder: Path, pp: int) -> None:
    with create_gangs("cpu", pp=pp) as gangs:
        load_model(folder, gangs=gangs, progress=False)


def test_more_stages_than_layers(pool4: Pool, staged: dict[str, Path]) -> None:
    for outcome in pool4.run(load_in_stages, staged["llama"], 4):
        assert isinstance(outcome.error, NotSupportedError)
        assert "as many layers, but the model has 3" in str(outcome.error)


def test_a_checkpoint_that_lacks_a_layer_of_one_stage(pool2: Pool, tmp_path: Path) -> None:
    folder = make(tmp_path / "qwen", num_hidden_layers=3)
    for outcome in pool2.run(load_in_stages, folder, 2):
        assert isinstance(outcome.error, ModelCheckpointMismatchError)
        assert "missing: model.layers.2" in str(outcome.error)


def load_verified(environment: dict[str, str]) -> int:
    with pytest.MonkeyPatch.context() as patch, create_gangs("cpu", pp=2) as gangs:
        for name, value in environment.items():
            patch.setenv(name, value)
        return load_with_report("tiny", gangs=gangs, dtype="auto", verify="always", progress=False)[1].tensors


def test_stages_check_what_they_read(pool2: Pool, home: Path) -> None:
    folder = home / "config" / "lading" / "cards"
    folder.mkdir(parents=True)
    file = make(folder / "tiny") / "model.safetensors"
    (folder / "mine.yaml").write_text(qwen_card("tiny", "tiny"))
    load_model("tiny", device="cpu", dtype="auto", verify="always", progress=False)
    environment = {n: v for n, v in os.environ.items() if n == "HOME" or n.startswith(("XDG_", "LADING_"))}
    # A layer and the table on the first rank; the other one, the normalization and the table again on the second.
    assert pool2.values(load_verified, environment) == [12, 13]

    data, mtime = bytearray(file.read_bytes()), file.stat().st_mtime_ns
    header = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + header])["model.norm.weight"]["data_offsets"]
    data[8 + header + begin] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(mtime, mtime))

    first, last = pool2.run(load_verified, environment)
    assert isinstance(last.error, DigestMismatchError)
    assert "model.norm.weight" in str(last.error)
    assert isinstance(first.error, GangError)
    assert "rank 1" in str(first.error)
