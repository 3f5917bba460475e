from __future__ import annotations

import pytest
import torch

from lading.families.nn.quantizer import GumbelQuantizer, init_quantizer


def make(temperature: tuple[float, float, float] = (2.0, 0.5, 0.5)) -> GumbelQuantizer:
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(6, 8, num_codebooks=2, num_entries=5, temperature=temperature)
    for name, parameter in quantizer.named_parameters():
        init_quantizer(name, parameter)

    return quantizer


def entries(quantizer: GumbelQuantizer) -> torch.Tensor:
    return quantizer.codevectors.view(2, 5, 4)


@torch.no_grad()
def test_the_likeliest_entries() -> None:
    quantizer = make().eval()
    x = torch.randn(3, 7, 6)

    found = quantizer(x)

    likeliest = quantizer.weight_proj(x).view(3, 7, 2, 5).argmax(-1)
    expected = torch.stack([entries(quantizer)[g][likeliest[:, :, g]] for g in range(2)], dim=2).flatten(2)
    assert torch.equal(found.vectors, expected)
    assert torch.equal(quantizer(x).vectors, found.vectors)
    assert quantizer.num_updates == 0


@torch.no_grad()
def test_entries_are_drawn_in_training() -> None:
    quantizer = make()
    x = torch.randn(3, 7, 6)

    found = quantizer(x).vectors.unflatten(-1, (2, 4))

    for g in range(2):
        distance = (found[:, :, g, None] - entries(quantizer)[g]).abs().amax(-1)
        assert (distance.amin(-1) < 1e-6).all()
    assert not torch.equal(quantizer(x).vectors, found.flatten(2))


def test_gradients() -> None:
    quantizer = make()
    x = torch.randn(3, 7, 6, requires_grad=True)

    found = quantizer(x)
    (found.vectors.square().sum() + found.prob_perplexity).backward()

    for tensor in (x, quantizer.codevectors, quantizer.weight_proj.weight, quantizer.weight_proj.bias):
        assert tensor.grad is not None
        assert (tensor.grad != 0).any()
    assert not found.code_perplexity.requires_grad


def test_the_temperature_falls_with_training_to_the_lowest() -> None:
    quantizer = make()
    x = torch.randn(1, 2, 6)

    assert [quantizer(x).temperature for _ in range(4)] == [2.0, 1.0, 0.5, 0.5]
    assert quantizer.eval()(x).temperature == 0.5
    assert quantizer.num_updates == 4

    quantizer.num_updates = 1
    assert quantizer.temperature == 1.0


@torch.no_grad()
def test_perplexities_count_entries() -> None:
    quantizer = make().eval()
    quantizer.weight_proj.weight.zero_()
    quantizer.weight_proj.bias.copy_(torch.tensor([0.0, 0, 0, 0, 0, 100, 0, 0, 0, 0]))

    found = quantizer(torch.randn(2, 3, 6))

    # All alike in the first codebook, where argmax takes the first, and one of the second.
    assert float(found.code_perplexity) == pytest.approx(2.0, rel=1e-5)
    assert float(found.prob_perplexity) == pytest.approx(6.0, rel=1e-5)


@torch.no_grad()
def test_half_precision() -> None:
    quantizer = make().to(torch.bfloat16)

    for module in (quantizer, quantizer.eval()):
        found = module(torch.randn(2, 3, 6, dtype=torch.bfloat16))
        assert found.vectors.dtype == torch.bfloat16
        assert found.prob_perplexity.dtype == found.code_perplexity.dtype == torch.float32


@pytest.mark.parametrize(("dim", "codebooks", "entries"), [(8, 3, 5), (8, 0, 5), (0, 2, 5), (8, 2, 0)])
def test_nonsense(dim: int, codebooks: int, entries: int) -> None:
    with pytest.raises(ValueError, match="multiple of the number of codebooks"):
        GumbelQuantizer(6, dim, num_codebooks=codebooks, num_entries=entries, temperature=(1, 1, 1))
