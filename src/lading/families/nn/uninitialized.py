"""torch's layers without random initialization.

A module is built on the meta device and then filled with the tensors of a checkpoint, or by the initialization of its
family. Random numbers from a constructor would be discarded, and on the meta device they are expensive: the first
``nn.Embedding`` imports 800 modules. The classes are subclasses of torch's, because
:func:`torch.distributed.tensor.parallel.parallelize_module` requires those.
"""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """``nn.Linear`` whose constructor leaves its parameters uninitialized."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class Embedding(nn.Embedding):
    """``nn.Embedding`` whose constructor leaves its table uninitialized."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` whose constructor leaves its parameters uninitialized."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` whose constructor leaves its parameters uninitialized."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class Conv1d(nn.Conv1d):
    """``nn.Conv1d`` whose constructor leaves its parameters uninitialized."""

    def reset_parameters(self) -> None:
        """Do nothing."""
