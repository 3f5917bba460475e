"""The options by which mixtures of experts differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lading.families.nn.checks import require_multiple, require_positive, require_size
from lading.families.nn.shapes import Shapes, projection, under
from lading.models.targets import Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """The options of a mixture of experts, and the layers that have one.

    :raises ValueError: the sizes are not valid, such as more chosen experts than there are.
    """

    num_experts: int
    top_k: int
    """The number of experts that process a token."""
    inner_dim: int
    """The inner width of an expert."""
    layers: frozenset[int] | None = None
    """The layers with experts, which have no other feed-forward network; ``None`` means all."""
    shared_inner_dim: int | None = None
    """The inner width of the expert of all tokens, whose output is added; ``None`` without one."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """The function of the router's logits: over all experts, or of each by itself."""
    normalized: bool = False
    """True if the scores of the chosen experts are divided by their sum."""
    scale: float = 1.0
    """The factor of these scores."""
    correction_bias: bool = False
    """True if a bias is added to the scores to choose the experts, but not to weigh them."""
    num_groups: int = 1
    """The number of groups of experts; the two best scores in each are added to choose among groups."""
    top_k_groups: int = 1
    """The number of groups from which experts are chosen."""
    wide_router: bool = False
    """True if logits are computed in float32, whatever the dtype."""
    weighs_inputs: bool = False
    """True if the scores weigh the inputs of the experts rather than their outputs."""
    transposed: bool = False
    """True if the weights of an expert are stored as inputs × outputs rather than outputs × inputs."""
    router_name: str = "gate"
    shared_name: str = "shared_experts"

    def __post_init__(self) -> None:
        require_positive(self, "num_experts", "top_k", "inner_dim", "scale", "num_groups", "top_k_groups")
        if self.shared_inner_dim is not None:
            require_positive(self, "shared_inner_dim")
        require_multiple(self, "num_experts", "num_groups")
        require_size("the inner width of all experts together", self.num_experts * self.inner_dim)
        if self.top_k_groups > self.num_groups:
            raise ValueError(
                f"`top_k_groups` must be at most the number of groups, {self.num_groups}, but is {self.top_k_groups}"
            )
        candidates = self.num_experts // self.num_groups * self.top_k_groups
        if self.top_k > candidates:
            raise ValueError(
                f"`top_k` must be at most the number of experts to choose from, {candidates}, but is {self.top_k}"
            )
        if self.num_groups > 1 and self.num_experts < 2 * self.num_groups:
            raise ValueError(
                f"`num_experts` must be at least 2 for each of the {self.num_groups} groups, but is {self.num_experts}"
            )

    def stacked_shapes(self, model_dim: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Return the shapes of the weights of all experts, of the projections into and out of the inner width."""
        if self.transposed:
            return (self.num_experts, model_dim, 2 * self.inner_dim), (self.num_experts, self.inner_dim, model_dim)

        return (self.num_experts, 2 * self.inner_dim, model_dim), (self.num_experts, model_dim, self.inner_dim)

    def shapes(self, model_dim: int) -> Shapes:
        """Return the names and shapes of the parameters of a mixture of experts in a model of width ``model_dim``."""
        up, down = self.stacked_shapes(model_dim)
        found: Shapes = {
            "experts.gate_up_proj": up,
            "experts.down_proj": down,
            f"{self.router_name}.weight": (self.num_experts, model_dim),
        }
        if self.correction_bias:
            found[f"{self.router_name}.e_score_correction_bias"] = Buffer((self.num_experts,))
        if self.shared_inner_dim is not None:
            found |= under(self.shared_name, gated_shapes(model_dim, self.shared_inner_dim))

        return found


def gated_shapes(model_dim: int, inner_dim: int, *, bias: bool = False) -> Shapes:
    """Return the parameters of a :class:`~lading.families.nn.ffn.GatedFeedForward`."""
    return {
        **projection("gate_proj", model_dim, inner_dim, bias=bias),
        **projection("up_proj", model_dim, inner_dim, bias=bias),
        **projection("down_proj", inner_dim, model_dim, bias=bias),
    }
