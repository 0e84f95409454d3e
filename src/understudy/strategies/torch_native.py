"""What DDP, FSDP2 and ZeRO stage 0 share: a PyTorch optimizer that steps on the module's own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from understudy.contracts import LazyTensor, LossScale, TensorSpec
from understudy.models.names import canonical_name
from understudy.optim.state import kept_state, restore_state
from understudy.parallel.world import World
from understudy.strategies.base import ModuleStrategy
from understudy.strategies.loss_scale import INITIAL_LOSS_SCALE, next_loss_scale
from understudy.strategies.precision import Precision

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
            torch._foreach_mul_([_local(gradient) for gradient in gradients], 1.0 / self.loss_scale.value)
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
            _local(parameter).copy_(read(name)[_held(tuple(parameter.shape), parameter)])

    def state(self, owner: Callable[[str], int | None]) -> Iterator[tuple[str, Tensor]]:
        return self._owned(self._parameters().items(), owner)

    def optimizer_layout(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in self._optimizer_tensors()}

    def optimizer_state(self, owner: Callable[[str], int]) -> Iterator[tuple[str, Tensor]]:
        return self._owned(self._optimizer_tensors(), owner)

    @torch.no_grad()
    def load_optimizer_state(self, stored: Mapping[str, Mapping[str, LazyTensor]]) -> None:
        for name, parameter in self._trained().items():
            kept = {key: _placed_like(value, parameter) for key, value in stored.get(name, {}).items()}
            if kept:
                restore_state(self.optimizer, parameter, kept)

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._trained().items():
            for key, value in kept_state(self.optimizer, parameter).items():
                yield f"{name}.{key}", _sharded_as(value, parameter)

    def _owned(
        self, tensors: Iterable[tuple[str, Tensor]], owner: Callable[[str], int | None]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if (rank := owner(name)) is None:
                continue
            whole = _joined(tensor, self.device, rank)
            if rank == self.world.rank:
                assert whole is not None, "the owner has it whole"
                yield name, whole


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharded_as(value: Tensor, parameter: Tensor) -> Tensor:
    """State of a sharded `parameter`: what an optimizer over local shards keeps of one is a shard too."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.ndim == 0:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        value, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _joined(tensor: Tensor, device: torch.device, owner: int) -> Tensor | None:
    """The whole tensor, on rank `owner`; a collective for DTensors. Others send their shard and may get None. Shards
    kept in host memory travel over the device."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    moved = tensor.detach().to(device)
    assert isinstance(moved, DTensor)
    if moved.device_mesh.ndim > 1 or not moved.placements[0].is_shard(0):
        return moved.full_tensor()
    rank, ranks, local = dist.get_rank(), dist.get_world_size(), moved.to_local()
    if rank != owner:
        if local.numel():
            _wait([dist.P2POp(dist.isend, local.contiguous(), owner)])
        return None
    whole = torch.empty(moved.shape, dtype=moved.dtype, device=device)
    # Rows are dealt as torch.chunk deals them: the last ranks may have fewer, or none.
    shares = torch.split(whole, -(-len(whole) // ranks)) if len(whole) else ()
    if local.numel():
        shares[rank].copy_(local)
    _wait([dist.P2POp(dist.irecv, share, peer) for peer, share in enumerate(shares) if peer != rank])
    return whole


def _wait(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def _held(shape: tuple[int, ...], parameter: Tensor) -> tuple[slice, ...]:
    """The part of a whole of `shape` that this rank holds, when it is sharded as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in shape)
    local, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, local))


def _placed_like(stored: LazyTensor, parameter: Tensor) -> Tensor:
    """What is stored of optimizer state, where `parameter` is: sharded with it if it has its rows, else whole."""
    if not stored.shape:
        return stored[()]
    device = _local(parameter).device
    if not isinstance(parameter, DTensor):
        return stored[_held(stored.shape, parameter)].to(device, copy=True)
    shape, mesh = torch.Size(stored.shape), parameter.device_mesh
    if shape[0] == parameter.shape[0]:
        local = stored[_held(shape, parameter)].to(device, copy=True)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
    whole = stored[_held(shape, torch.empty(()))].to(device, copy=True)
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
