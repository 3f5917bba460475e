"""How a module is split over devices, stated beside the module as a value. Pure: no torch.

Names are those of modules; ``*`` stands for one part of a name, such as the index of a layer.
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
    """What tensor parallelism does to a module, and how its inputs and outputs lie on the ranks.

    A module that no plan names stays as it is: each rank holds all of it, and computes the same with it.
    """

    COLUMN = "column"
    """A linear whose output features are split: all ranks are given the same input, each gives its own features."""
    ROW = "row"
    """A linear whose input features are split: each rank brings its own, all get the sum."""
    KEY_VALUE = "key_value"
    """As ``COLUMN``, head by head. With more ranks than heads, all ranks hold all heads, and as many ranks as there are
    to a head share its output."""
    VOCABULARY = "vocabulary"
    """An embedding table whose rows are split: each rank looks up its own symbols, all get all embeddings."""
    LOGITS = "logits"
    """As ``COLUMN``, with all ranks getting all features."""
    HEADS = "heads"
    """A normalisation of (N, S, heads, head_dim) that holds the same parameters on all ranks, whose heads differ."""
    REPLICATED = "replicated"
    """All ranks hold and compute the same, and the parameters live on the same mesh as those that are split."""


_DIMS: Mapping[Split, int] = {Split.ROW: 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """How a stack of layers is cut into the stages of a pipeline. A module that is not named is in all of them."""

    layers: str
    """The names of the layers; ``*`` stands for the index, from 0."""
    num_layers: int
    first: Sequence[str] = ()
    """Names of the modules before the layers, which are in the first stage alone."""
    last: Sequence[str] = ()
    """Names of the modules behind the layers, which are in the last stage alone."""

    def cut(self, pp: int) -> tuple[range, ...]:
        """The layers of each of ``pp`` stages.

        Their numbers differ by one at most. The middle stages have the odd ones, as the first and the last hold
        embedding and output besides; where there is no middle, an earlier stage has them, as the output is the dearer.

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
        """The one of ``pp`` stages that each module is in, of those that are in one alone, by name.

        :raises NotSupportedError: there are fewer layers than stages.
        """
        places = {self.layers.replace("*", str(i)): stage for stage, own in enumerate(self.cut(pp)) for i in own}

        return places | dict.fromkeys(self.first, 0) | dict.fromkeys(self.last, pp - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """Which axes of parallelism a family serves, and how."""

    tensor: Mapping[str, Split] | None = None
    """For tensor parallelism: names of modules → what is done to them; ``None`` where the family does not have it."""
    divisible: Mapping[str, int] = field(default_factory=dict)
    """Sizes that the ranks of tensor parallelism must divide, by their names in the configuration."""
    num_key_value_heads: int = 1
    """Of the modules that are ``KEY_VALUE``. Their ranks divide it, or it divides them."""
    units: Sequence[str] | None = None
    """For fully sharded data parallelism: names of the modules whose parameters are gathered together, each module
    when it is needed; what they leave over is gathered once. ``None`` where the family does not have it."""
    stages: Stages | None = None
    """For pipeline parallelism; ``None`` where the family does not have it."""

    def check(self, tp: int) -> None:
        """:raises NotSupportedError: ``tp`` ranks cannot split a module of this configuration evenly."""
        if self.tensor is None or tp == 1:
            return

        uneven = [f"`{name}` is {size}" for name, size in self.divisible.items() if size % tp]
        heads = self.num_key_value_heads
        if Split.KEY_VALUE in self.tensor.values() and heads % tp and tp % heads:
            uneven.append(f"`num_key_value_heads` is {heads}, which is no divisor of {tp} either")

        if uneven:
            raise NotSupportedError(
                f"Tensor parallelism over {tp} ranks needs sizes that {tp} divides, but {', '.join(uneven)}. Use a "
                "`tp` that divides all of them."
            )

    def split_of(self, module: str) -> Split | None:
        """What tensor parallelism does to the module of this name."""
        if not self.tensor:
            return None
        match = _any_of(tuple(self.tensor)).fullmatch(module)

        return None if match is None else self.tensor[tuple(self.tensor)[(match.lastindex or 1) - 1]]

    def shard_dim(self, parameter: str) -> int:
        """The dim of a parameter along which ranks cut it: that of tensor parallelism, or the first."""
        module, _, leaf = parameter.rpartition(".")
        split = self.split_of(module)

        return 0 if split is None or leaf != "weight" else _DIMS.get(split, 0)


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` stands for ``name``."""
    return _any_of((pattern,)).fullmatch(name) is not None


@lru_cache(maxsize=256)
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """An expression with a group for each pattern: names by the hundred thousand go through it."""
    return re.compile("|".join("(" + "[^.]+".join(map(re.escape, p.split("*"))) + ")" for p in patterns))
