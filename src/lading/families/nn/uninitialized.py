"""torch's layers without random initialization.

A module is built on the meta device and then filled with the tensors of a checkpoint, or by the initialization of its
family. Random numbers from a constructor would be discarded, and on the meta device they are expensive: the first
``nn.Embedding`` imports 800 modules. The classes are subclasses of torch's, because
:func:`torch.distributed.tensor.parallel.parallelize_module` requires those.
"""

from __future__ import annotations

from torch import nn


class _Uninitialized:
    def reset_parameters(self) -> None:
        """Do nothing."""


class Linear(_Uninitialized, nn.Linear):
    """``nn.Linear`` whose constructor leaves its parameters uninitialized."""


class Embedding(_Uninitialized, nn.Embedding):
    """``nn.Embedding`` whose constructor leaves its table uninitialized."""


class LayerNorm(_Uninitialized, nn.LayerNorm):
    """``nn.LayerNorm`` whose constructor leaves its parameters uninitialized."""


class GroupNorm(_Uninitialized, nn.GroupNorm):
    """``nn.GroupNorm`` whose constructor leaves its parameters uninitialized."""


class Conv1d(_Uninitialized, nn.Conv1d):
    """``nn.Conv1d`` whose constructor leaves its parameters uninitialized."""


class BatchNorm1d(_Uninitialized, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` whose constructor leaves its parameters uninitialized."""


class Conv2d(_Uninitialized, nn.Conv2d):
    """``nn.Conv2d`` whose constructor leaves its parameters uninitialized."""


class Conv3d(_Uninitialized, nn.Conv3d):
    """``nn.Conv3d`` whose constructor leaves its parameters uninitialized."""
