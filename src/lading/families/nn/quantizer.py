"""Product quantization with Gumbel noise, as in wav2vec 2.0 (https://arxiv.org/abs/2006.11477, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax, one_hot

from lading.families.nn.checks import require_quantizer
from lading.families.nn.uninitialized import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerOutput:
    """The quantized vectors, and the use of the codebooks."""

    vectors: Tensor
    """The quantized vectors, (N, S, output_dim)."""
    entries: Tensor
    """The index of the entry from each codebook, (N, S, num_codebooks), int64."""
    code_perplexity: Tensor
    """The perplexity of the likeliest entries, summed over the codebooks; scalar, float32."""
    prob_perplexity: Tensor
    """The perplexity of the probabilities without noise, with a gradient; scalar, float32."""
    temperature: float
    """The temperature of the noise in training."""


class GumbelQuantizer(nn.Module):
    """A quantizer that replaces a vector by one entry from each codebook; its parameters are uninitialized.

    In training, entries are drawn (https://arxiv.org/abs/1611.01144); otherwise they are the likeliest ones.

    :param temperature: the temperature of the first update, the lowest one, and the factor between two updates.

    :raises ValueError: the number of codebooks doesn't divide ``output_dim``.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        *,
        num_codebooks: int,
        num_entries: int,
        temperature: tuple[float, float, float],
    ) -> None:
        super().__init__()

        require_quantizer(output_dim, num_codebooks, num_entries)

        self.num_codebooks = num_codebooks
        self.num_entries = num_entries
        self.max_temperature, self.min_temperature, self.temperature_decay = temperature

        self.num_updates = 0
        """The number of updates in training, which sets the temperature. It is not part of the state dict: a trainer
        that resumes from a checkpoint sets it."""

        self.codevectors = nn.Parameter(torch.empty(1, num_codebooks * num_entries, output_dim // num_codebooks))
        self.weight_proj = Linear(input_dim, num_codebooks * num_entries)

    @property
    def temperature(self) -> float:
        """The temperature of the next update."""
        return max(self.max_temperature * self.temperature_decay**self.num_updates, self.min_temperature)

    def forward(self, x: Tensor) -> QuantizerOutput:
        """Quantize (N, S, input_dim) → (N, S, output_dim)."""
        temperature = self.temperature

        # (N, S, codebooks, entries)
        logits = self.weight_proj(x).unflatten(-1, (self.num_codebooks, self.num_entries))
        wide = logits.float()
        likeliest = one_hot(logits.argmax(-1), self.num_entries)

        if self.training:
            chosen = gumbel_softmax(wide, tau=temperature, hard=True).to(logits.dtype)
            self.num_updates += 1
        else:
            chosen = likeliest.to(logits.dtype)

        entries = self.codevectors.view(self.num_codebooks, self.num_entries, -1)

        return QuantizerOutput(
            vectors=torch.einsum("nsgv,gvd->nsgd", chosen, entries).flatten(2),
            entries=chosen.argmax(-1),
            code_perplexity=_perplexity(likeliest.float()),
            prob_perplexity=_perplexity(wide.softmax(-1)),
            temperature=temperature,
        )


def _perplexity(probabilities: Tensor) -> Tensor:
    """Reduce (N, S, codebooks, entries) → a scalar."""
    mean = probabilities.flatten(0, 1).mean(0)

    return torch.exp(-torch.sum(mean * torch.log(mean + 1e-7), dim=-1)).sum()


@torch.no_grad()
def init_quantizer(name: str, parameter: Tensor) -> None:
    """Initialize ``parameter`` randomly.

    :param name: the name of the parameter in a :class:`GumbelQuantizer`.
    """
    if name == "codevectors":
        nn.init.uniform_(parameter)
    elif name == "weight_proj.weight":
        nn.init.normal_(parameter)
    else:
        parameter.zero_()
