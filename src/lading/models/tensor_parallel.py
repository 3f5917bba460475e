"""Styles of tensor parallelism: a module's parameters become this rank's part of them, and its inputs and outputs are
handed over from rank to rank.

torch's own styles place a parameter by sending it, and look at the signature of each function that they hook in: a
third of a millisecond for each linear, where a rank's part of a small model is read in fifty. Parameters without memory
have nothing to be sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import Module

from lading.errors import InternalError
from lading.models.placements import Parts


class SplitStyle(ParallelStyle):
    """What tensor parallelism does to a module on the meta device, for ``parallelize_module``.

    :param placement: of a parameter, by the last part of its name.
    :param enter: how the inputs lie on the ranks.
    :param leave: how the outputs are to lie.
    :param as_view: whether the output may be a view of a ``DTensor``'s part.
    """

    def __init__(
        self, placement: Callable[[str], Placement], enter: Placement, leave: Placement, *, as_view: bool
    ) -> None:
        super().__init__()
        self._placement = placement
        self._enter = enter
        self._leave = leave
        self._as_view = as_view
        self._parts = Parts()

    def _apply(self, module: Module, device_mesh: DeviceMesh) -> Module:
        for owner in module.modules():
            for leaf, parameter in list(owner.named_parameters(recurse=False)):
                owner.register_parameter(leaf, self._parts.on_meta(parameter, device_mesh, self._placement(leaf)))

        def before(module: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(self._entered(x, device_mesh) for x in inputs)

        def after(module: Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
            if not isinstance(output, DTensor):
                raise InternalError(f"{type(module).__name__} cannot be split: its output is not of its inputs")

            return self._left(output, device_mesh)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

        return module

    def _entered(self, x: Any, mesh: DeviceMesh) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, DTensor):
            return x

        return DTensor.from_local(x, mesh, (self._enter,), run_check=False)

    def _left(self, output: DTensor, mesh: DeviceMesh) -> Tensor:
        if output.placements != (self._leave,):
            output = output.redistribute(placements=(self._leave,))
        local: Tensor = output.to_local() if self._as_view else _Local.apply(output)  # type: ignore[no-untyped-call]

        return local


class SharedHeads(SplitStyle):
    """All ranks hold all heads of a projection, and each goes on with the one that its queries attend to.

    :param heads: of the projection, fewer than ranks.
    """

    def __init__(self, placement: Callable[[str], Placement], heads: int) -> None:
        super().__init__(placement, Replicate(), Replicate(), as_view=True)
        self._heads = heads

    def _left(self, output: DTensor, mesh: DeviceMesh) -> Tensor:
        # Each rank's gradient is of one head only; that of the parameters is the sum over all ranks.
        features: Tensor = output.to_local(grad_placements=(Partial(),))

        return features.tensor_split(self._heads, -1)[mesh.get_local_rank() * self._heads // mesh.size()]


class _Local(Function):
    """The part of a ``DTensor`` that this rank holds.

    ``to_local`` gives a view, and FSDP warns of each module of its own that returns one.
    """

    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.placed = tensor.device_mesh, tensor.placements

        return tensor.to_local()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> DTensor:
        return DTensor.from_local(gradients[0], *ctx.placed, run_check=False)
