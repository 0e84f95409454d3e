"""What DDP, FSDP2 and ZeRO stage 0 share: a PyTorch optimizer that steps on the module's own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from understudy.contracts import LazyTensor, LossScale, TensorSpec
from understudy.models.names import canonical_name
from understudy.optim.state import kept_state, restore_state
from understudy.parallel.world import World
from understudy.strategies.base import ModuleStrategy
from understudy.strategies.loss_scale import INITIAL_LOSS_SCALE, next_loss_scale
from understudy.strategies.precision import Precision
from understudy.strategies.sharded_tensors import held_slices, joined, local_part, placed_like, sharded_as

__all__ = ["TorchStrategy"]


class TorchStrategy(ModuleStrategy):
    """Parameters are whole tensors or DTensors, and `optimizer` steps on them; subclasses set both in `build`."""

    optimizer: torch.optim.Optimizer

    def __init__(self, device: torch.device, world: World, precision: Precision) -> None:
        super().__init__(device, world, precision)
        self.loss_scale: LossScale | None = INITIAL_LOSS_SCALE if precision.loss_scaling else None

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
            torch._foreach_mul_([local_part(gradient) for gradient in gradients], 1.0 / self.loss_scale.value)
        norm = get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        finite = bool(torch.isfinite(norm))
        if finite:
            if max_norm is not None:
                clip_grads_with_norm_(parameters, max_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self._step()
        self._clear_gradients()
        if self.loss_scale:
            self.loss_scale = next_loss_scale(self.loss_scale, overflowed=not finite)
        return norm.float()

    def _clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {canonical_name(name): parameter for name, parameter in self.module.named_parameters()}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self._parameters().items() if parameter.requires_grad}

    def layout(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tuple(p.shape), p.dtype) for name, p in self._parameters().items()}

    @torch.no_grad()
    def load_state(self, read: Callable[[str], LazyTensor]) -> None:
        for name, parameter in self._parameters().items():
            local_part(parameter).copy_(read(name)[held_slices(tuple(parameter.shape), parameter)])

    def state(self, owner: Callable[[str], int | None]) -> Iterator[tuple[str, Tensor]]:
        return self._owned(self._parameters().items(), owner)

    def optimizer_layout(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in self._optimizer_tensors()}

    def optimizer_state(self, owner: Callable[[str], int]) -> Iterator[tuple[str, Tensor]]:
        return self._owned(self._optimizer_tensors(), owner)

    @torch.no_grad()
    def load_optimizer_state(self, stored: Mapping[str, Mapping[str, LazyTensor]]) -> None:
        for name, parameter in self._trained().items():
            kept = {key: placed_like(value, parameter) for key, value in stored.get(name, {}).items()}
            if kept:
                restore_state(self.optimizer, parameter, kept)

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._trained().items():
            for key, value in kept_state(self.optimizer, parameter).items():
                yield f"{name}.{key}", sharded_as(value, parameter)

    def _owned(
        self, tensors: Iterable[tuple[str, Tensor]], owner: Callable[[str], int | None]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if (rank := owner(name)) is None:
                continue
            whole = joined(tensor, self.device, rank)
            if rank == self.world.rank:
                assert whole is not None, "the owner has it whole"
                yield name, whole
