"""The options of latent attention."""

from __future__ import annotations

from dataclasses import dataclass

from lading.families.nn.checks import require_positive
from lading.families.nn.shapes import Shapes, projection


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """The options of multi-head latent attention (https://arxiv.org/abs/2405.04434).

    A head compares queries and keys of two parts: one that each head has by itself, and a rotated one, whose key
    is the same for all heads.

    :raises ValueError: the sizes are not valid.
    """

    query_rank: int | None
    """The width of the latent vector of queries; ``None`` if they are projected in one step."""
    key_value_rank: int
    """The width of the latent vector of keys and values."""
    head_dim: int
    """The width of the part of queries and keys that is not rotated."""
    rotary_dim: int
    """The width of the rotated part."""
    value_dim: int
    """The width of the values of a head."""
    bias: bool = False
    """True if the projections to latent vectors, and that of the output, have a bias."""

    def __post_init__(self) -> None:
        require_positive(self, "key_value_rank", "head_dim", "rotary_dim", "value_dim")
        if self.query_rank is not None:
            require_positive(self, "query_rank")
        if self.rotary_dim % 2 != 0:
            raise ValueError(f"the rotated part of a head must be of even width, but is of {self.rotary_dim}")

    @property
    def query_dim(self) -> int:
        """The width of the queries and the keys of a head."""
        return self.head_dim + self.rotary_dim

    def shapes(self, model_dim: int, num_heads: int) -> Shapes:
        """Return the names and shapes of the parameters, in a model of width ``model_dim``."""
        queries, expanded = num_heads * self.query_dim, num_heads * (self.head_dim + self.value_dim)
        if self.query_rank is None:
            found = projection("q_proj", model_dim, queries, bias=False)
        else:
            found = {
                **projection("q_a_proj", model_dim, self.query_rank, bias=self.bias),
                "q_a_layernorm.weight": (self.query_rank,),
                **projection("q_b_proj", self.query_rank, queries, bias=False),
            }

        return {
            **found,
            **projection("kv_a_proj_with_mqa", model_dim, self.key_value_rank + self.rotary_dim, bias=self.bias),
            "kv_a_layernorm.weight": (self.key_value_rank,),
            **projection("kv_b_proj", self.key_value_rank, expanded, bias=False),
            **projection("o_proj", num_heads * self.value_dim, model_dim, bias=self.bias),
        }
