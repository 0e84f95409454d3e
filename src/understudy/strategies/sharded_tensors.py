"""FSDP2's sharded tensors: what of one is here, putting it together, and making one like another."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from understudy.contracts import LazyTensor

__all__ = ["held_slices", "joined", "local_part", "placed_like", "sharded_as"]


def local_part(tensor: Tensor) -> Tensor:
    """What of `tensor` is on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_as(value: Tensor, parameter: Tensor) -> Tensor:
    """State of a sharded `parameter`: what an optimizer over local shards keeps of one is a shard too."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.ndim == 0:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        value, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def joined(tensor: Tensor, device: torch.device, owner: int) -> Tensor | None:
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


def held_slices(shape: tuple[int, ...], parameter: Tensor) -> tuple[slice, ...]:
    """The part of a whole of `shape` that this rank holds, when it is sharded as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in shape)
    local, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, local))


def placed_like(stored: LazyTensor, parameter: Tensor) -> Tensor:
    """What is stored of optimizer state, where `parameter` is: sharded with it if it has its rows, else whole."""
    if not stored.shape:
        return stored[()]
    device = local_part(parameter).device
    if not isinstance(parameter, DTensor):
        return stored[held_slices(stored.shape, parameter)].to(device, copy=True)
    shape, mesh = torch.Size(stored.shape), parameter.device_mesh
    if shape[0] == parameter.shape[0]:
        local = stored[held_slices(shape, parameter)].to(device, copy=True)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
    whole = stored[held_slices(shape, torch.empty(()))].to(device, copy=True)
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
