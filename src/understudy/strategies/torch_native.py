"""What DDP, FSDP2 and ZeRO stage 0 share: a PyTorch optimizer that steps on the module's own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from understudy.contracts import LazyTensor, TensorSpec
from understudy.parallel.world import World
from understudy.strategies.base import ModuleStrategy
from understudy.strategies.loss_scale import LossScale
from understudy.strategies.names import canonical_name
from understudy.strategies.precision import Precision

__all__ = ["TorchStrategy"]


class TorchStrategy(ModuleStrategy):
    """Parameters are whole tensors or DTensors, and `optimizer` steps on them; subclasses set both in `build`."""

    optimizer: torch.optim.Optimizer

    def __init__(self, device: torch.device, world: World, precision: Precision) -> None:
        super().__init__(device, world, precision)
        self.loss_scale = LossScale() if precision.loss_scaling else None

    def _loss_factor(self) -> float:
        return self.loss_scale.value if self.loss_scale else 1.0

    def _backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def _step(self) -> None:
        self.optimizer.step()

    def optimizer_step(self, lr: float, max_norm: float | None) -> Tensor:
        parameters = [parameter for parameter in self._parameters().values() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.loss_scale:
            torch._foreach_mul_([_local(gradient) for gradient in gradients], 1.0 / self.loss_scale.value)
        norm = get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        finite = bool(torch.isfinite(norm))
        if finite:
            if max_norm is not None:
                clip_grads_with_norm_(parameters, max_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self._step()
        self._clear_gradients()
        if self.loss_scale:
            self.loss_scale.update(overflowed=not finite)
        return norm.float()

    def _clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {canonical_name(name): parameter for name, parameter in self.module.named_parameters()}

    def layout(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tuple(p.shape), p.dtype) for name, p in self._parameters().items()}

    @torch.no_grad()
    def load_state(self, read: Callable[[str], LazyTensor]) -> None:
        for name, parameter in self._parameters().items():
            _local(parameter).copy_(read(name)[_held(parameter)])

    @torch.no_grad()
    def state(self, owner: Callable[[str], int]) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters().items():
            whole = _gathered(parameter, self.device)
            if owner(name) == self.world.rank:
                yield name, whole.cpu()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathered(parameter: Tensor, device: torch.device) -> Tensor:
    """The whole tensor; shards kept in host memory travel over the device."""
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    moved = parameter.detach().to(device)
    assert isinstance(moved, DTensor)
    return moved.full_tensor()


def _held(parameter: Tensor) -> tuple[slice, ...]:
    """The part of the whole that this rank holds."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape))
