"""Styles of tensor parallelism, which split the parameters of a module and redistribute its inputs and outputs.

torch's own styles send parameters between ranks and inspect the signature of each hook, which takes a third of a
millisecond per linear; reading a rank's part of a small model takes fifty. Parameters on the meta device need no
communication.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import Module

from lading.errors import InternalError
from lading.models.placements import DTensorFactory


class SplitStyle(ParallelStyle):
    """The style of a split module on the meta device, for ``parallelize_module``.

    :param placement: the placement of a parameter, by the last component of its name.
    :param enter: the placement of the inputs.
    :param leave: the placement of the outputs.
    :param as_view: whether the output may be a view of the local part of a ``DTensor``.
    """

    def __init__(
        self, placement: Callable[[str], Placement], enter: Placement, leave: Placement, *, as_view: bool
    ) -> None:
        super().__init__()
        self._placement = placement
        self._enter = enter
        self._leave = leave
        self._as_view = as_view
        self._parts = DTensorFactory()

    def _apply(self, module: Module, device_mesh: DeviceMesh) -> Module:
        for owner in module.modules():
            for leaf, parameter in list(owner.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):  # of an inner module with a style of its own
                    continue
                placements = (self._placement(leaf),)
                owner.register_parameter(leaf, self._parts.on_meta(parameter, device_mesh, placements))

        def before(module: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(self._distribute_input(x, device_mesh) for x in inputs)

        def after(module: Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
            if not isinstance(output, DTensor):
                raise InternalError(
                    f"{type(module).__name__} cannot be split: its output does not depend on its inputs"
                )

            return self._localize_output(output, device_mesh)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

        return module

    def _distribute_input(self, x: Any, mesh: DeviceMesh) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, DTensor):
            return x

        return DTensor.from_local(x, mesh, (self._enter,), run_check=False)

    def _localize_output(self, output: DTensor, mesh: DeviceMesh) -> Tensor:
        if output.placements != (self._leave,):
            output = output.redistribute(placements=(self._leave,))
        local: Tensor = output.to_local() if self._as_view else _Local.apply(output)  # type: ignore[no-untyped-call]

        return local


class SharedHeads(SplitStyle):
    """The style of a projection whose heads are on all ranks; each rank uses the head that its queries attend to.

    :param heads: the number of heads, fewer than ranks.
    """

    def __init__(self, placement: Callable[[str], Placement], heads: int) -> None:
        super().__init__(placement, Replicate(), Replicate(), as_view=True)
        self._heads = heads

    def _localize_output(self, output: DTensor, mesh: DeviceMesh) -> Tensor:
        # Each rank has the gradient of one head; the gradient of the parameters is the sum over all ranks.
        features: Tensor = output.to_local(grad_placements=(Partial(),))

        return features.tensor_split(self._heads, -1)[mesh.get_local_rank() * self._heads // mesh.size()]


class SplitExperts:
    """The style of experts. Each rank holds some: it gets all tokens and choices, and the ranks sum outputs.

    :param num_experts: the number of experts on all ranks.
    :param mesh: the mesh of these ranks; of several dims, the first splits the experts first.
    """

    def __init__(self, num_experts: int, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._parts = DTensorFactory()
        place = 0
        for size, coordinate in zip(mesh.shape, mesh.get_coordinate() or (), strict=True):
            place = place * size + coordinate
        self._first = place * (num_experts // mesh.size())
        self._whole = (Replicate(),) * mesh.ndim
        self._terms = (Partial(),) * mesh.ndim

    def apply(self, experts: Module) -> None:
        """Split the parameters of ``experts``, and redistribute the inputs and outputs.

        :param experts: a module that maps tokens, the indices of the experts of each, and their weights to the sum of
            the outputs of those experts that it holds, whose indices count from 0.
        """
        placements = (Shard(0),) * self._mesh.ndim
        for leaf, parameter in list(experts.named_parameters(recurse=False)):
            experts.register_parameter(leaf, self._parts.on_meta(parameter, self._mesh, placements))
        experts.register_forward_pre_hook(self._before)
        experts.register_forward_hook(self._after)

    def _before(self, module: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, chosen, weights = inputs

        return self._enter(x), chosen - self._first, self._enter(weights)

    def _enter(self, x: Tensor) -> Tensor:
        # Each rank has the gradient by its own experts; the gradient is the sum over all ranks.
        shared = DTensor.from_local(x, self._mesh, self._whole, run_check=False)

        return shared.to_local(grad_placements=self._terms)

    def _after(self, module: Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        term = DTensor.from_local(output, self._mesh, self._terms, run_check=False)

        return term.redistribute(placements=self._whole).to_local()


class _Local(Function):
    """The local part of a ``DTensor``, as a tensor that is not a view.

    ``to_local`` returns a view, and FSDP warns about each of its modules that returns one.
    """

    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.placed = tensor.device_mesh, tensor.placements

        return tensor.to_local()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> DTensor:
        return DTensor.from_local(gradients[0], *ctx.placed, run_check=False)
