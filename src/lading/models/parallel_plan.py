"""Parallel plans: values that describe how modules are split over devices. Pure: no torch.

Names are names of modules; ``*`` matches one component of a name, such as the index of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from itertools import accumulate

from lading.errors import NotSupportedError


class Split(Enum):
    """The way that tensor parallelism splits a module, and the layout of its inputs and outputs on the ranks.

    A module without a split stays whole: each rank holds all of it and computes the same.
    """

    COLUMN = "column"
    """A linear with split output features: all ranks get the same input, and each returns its own features."""
    ROW = "row"
    """A linear with split input features: each rank passes its own, and all ranks get the sum."""
    KEY_VALUE = "key_value"
    """The same as ``COLUMN``, by heads. With more ranks than heads, all ranks hold all heads, and several ranks share
    the output of a head."""
    VOCABULARY = "vocabulary"
    """An embedding table with split rows: each rank looks up its own symbols, and all ranks get all embeddings."""
    LOGITS = "logits"
    """The same as ``COLUMN``, but all ranks get all features."""
    HEADS = "heads"
    """A normalization of (N, S, heads, head_dim) with the same parameters on all ranks, applied to different heads."""
    EXPERTS = "experts"
    """Feed-forward networks with stacked weights, split along the first dim, also by expert parallelism. Such a module
    maps tokens, the indices of the networks of each, and their weights to weighted sums; with indices that it lacks, it
    skips them. All ranks pass the same, each applies its own networks, and all get the sum."""
    FEATURES = "features"
    """A module without parameters from features to as many features, split over the ranks as after ``COLUMN``.
    Statistics over the features, such as their mean, are those of all ranks."""
    REPLICATED = "replicated"
    """A module that all ranks hold and compute alike, with parameters on the same mesh as those that are split."""


_DIMS: Mapping[Split, int] = {Split.ROW: 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The division of a stack of layers into pipeline stages. A module that is not named is in all stages."""

    layers: str
    """The names of the layers, with ``*`` for the index, which counts from 0."""
    num_layers: int
    first: Sequence[str] = ()
    """The names of the modules before the layers, which are in the first stage only."""
    last: Sequence[str] = ()
    """The names of the modules after the layers, which are in the last stage only."""

    def cut(self, pp: int) -> tuple[range, ...]:
        """Return the layers of each of ``pp`` stages.

        Their numbers differ by one at most. The middle stages get the extra layers, because the first and the last also
        hold embedding and output; without a middle stage an earlier one does, because the output costs more.

        :raises NotSupportedError: there are fewer layers than stages.
        """
        if pp > self.num_layers:
            raise NotSupportedError(
                f"A pipeline of {pp} stages needs as many layers, but the model has {self.num_layers}. Use a `pp` of "
                f"at most {self.num_layers}."
            )

        size, odd = divmod(self.num_layers, pp)
        begin = (pp - odd) // 2
        sizes = [size + (begin <= stage < begin + odd) for stage in range(pp)]
        ends = list(accumulate(sizes))

        return tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))

    def places(self, pp: int) -> dict[str, int]:
        """Return the stage of each module that is in one of ``pp`` stages only, by name.

        :raises NotSupportedError: there are fewer layers than stages.
        """
        places = {self.layers.replace("*", str(i)): stage for stage, own in enumerate(self.cut(pp)) for i in own}

        return places | dict.fromkeys(self.first, 0) | dict.fromkeys(self.last, pp - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """The axes of parallelism that a family supports, with a plan for each."""

    tensor: Mapping[str, Split] | None = None
    """The names of modules and their splits for tensor parallelism; ``None`` if the family does not support it."""
    divisible: Mapping[str, int] = field(default_factory=dict)
    """The sizes that the number of tensor-parallel ranks must divide, by their names in the configuration."""
    num_key_value_heads: int = 1
    """The number of heads of ``KEY_VALUE`` modules; it divides the number of ranks, or the reverse."""
    num_experts: int = 1
    """The number of networks in ``EXPERTS`` modules."""
    units: Sequence[str] | None = None
    """The names of the modules whose parameters fully sharded data parallelism gathers together, each when it is
    needed; all other parameters are gathered once. ``None`` if the family does not support it."""
    stages: Stages | None = None
    """The stages of pipeline parallelism; ``None`` if the family does not support it."""

    @property
    def has_experts(self) -> bool:
        """True if expert parallelism splits a module."""
        return self.tensor is not None and Split.EXPERTS in self.tensor.values()

    def check(self, tp: int, ep: int = 1) -> None:
        """Require that ``tp`` ranks, and ``ep × tp`` ranks of experts, split each module of this configuration evenly.

        :raises NotSupportedError: they do not.
        """
        if self.tensor is None:
            return
        if self.has_experts and self.num_experts % (ep * tp):
            raise NotSupportedError(
                f"The ranks along `ep` and `tp` split whole experts, but `num_experts` is {self.num_experts}, which "
                f"{ep * tp} (ep {ep} × tp {tp}) does not divide. Use an `ep` and a `tp` whose product divides it."
            )
        if tp == 1:
            return

        uneven = [f"`{name}` is {size}" for name, size in self.divisible.items() if size % tp]
        heads = self.num_key_value_heads
        if Split.KEY_VALUE in self.tensor.values() and heads % tp and tp % heads:
            uneven.append(f"`num_key_value_heads` is {heads}, which does not divide {tp} either")

        if uneven:
            raise NotSupportedError(
                f"Tensor parallelism over {tp} ranks needs sizes that {tp} divides, but {', '.join(uneven)}. Use a "
                "`tp` that divides all of them."
            )

    def split_of(self, module: str) -> Split | None:
        """Return the split of the module of this name, or ``None``."""
        if not self.tensor:
            return None
        match = _any_of(tuple(self.tensor)).fullmatch(module)

        return None if match is None else self.tensor[tuple(self.tensor)[(match.lastindex or 1) - 1]]

    def shard_dim(self, parameter: str) -> int:
        """Return the dim along which ranks split a parameter: that of tensor parallelism, or the first."""
        module, _, leaf = parameter.rpartition(".")
        split = self.split_of(module)

        return 0 if split is None or leaf != "weight" else _DIMS.get(split, 0)


def matches(pattern: str, name: str) -> bool:
    """Return whether ``pattern`` matches ``name``."""
    return _any_of((pattern,)).fullmatch(name) is not None


@lru_cache(maxsize=256)
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Compile one expression with a group per pattern, because it matches hundreds of thousands of names."""
    return re.compile("|".join("(" + "[^.]+".join(map(re.escape, p.split("*"))) + ")" for p in patterns))
