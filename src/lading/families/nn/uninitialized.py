"""torch's layers without their initialisers.

A module is built on the meta device and then filled, with the tensors of a checkpoint or by the one scheme of its
family. Numbers drawn by a constructor would be thrown away, and on the meta device drawing them is dear: the first
``nn.Embedding`` imports 800 modules for it. The classes stay subclasses of torch's, because
:func:`torch.distributed.tensor.parallel.parallelize_module` asks for those.
"""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """``nn.Linear`` whose constructor leaves its parameters uninitialised."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class Embedding(nn.Embedding):
    """``nn.Embedding`` whose constructor leaves its table uninitialised."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` whose constructor leaves its parameters uninitialised."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` whose constructor leaves its parameters uninitialised."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class Conv1d(nn.Conv1d):
    """``nn.Conv1d`` whose constructor leaves its parameters uninitialised."""

    def reset_parameters(self) -> None:
        """Do nothing."""
