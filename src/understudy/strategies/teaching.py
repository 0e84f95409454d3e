"""A frozen model beside the one that is trained: in each process, or its layers shared out over all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from understudy.contracts import LazyTensor
from understudy.models.language_model import LanguageModel
from understudy.models.names import canonical_name
from understudy.parallel.world import World
from understudy.strategies.base import materialize
from understudy.strategies.sharded_tensors import held_slices, local_part

__all__ = ["hold", "hold_sharded"]

Read = Callable[[str], LazyTensor]


@torch.no_grad()
def hold(model: LanguageModel, read: Read, device: torch.device, dtype: torch.dtype) -> None:
    """Gives `model`, on the meta device, its weights on `device`, all of them, in `dtype`; nothing of it is trained."""
    model.requires_grad_(False)
    materialize(model, device, lambda _: dtype)
    _load(model, read)


@torch.no_grad()
def hold_sharded(model: LanguageModel, read: Read, device: torch.device, dtype: torch.dtype, world: World) -> None:
    """As `hold`, with the weights of decoder layers shared out over all ranks: a layer is whole while it computes.
    Embedding, last norm and head are whole on each. A collective, and so is every use."""
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    mesh = init_device_mesh(device.type, (world.size,))
    for layer in model.decoder_layers():
        # Each is a root of its own, and a root would stay whole after its first use.
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(), reshard_after_forward=True)
    buffers = dict(model.named_buffers())
    for layer in model.decoder_layers():
        layer.to_empty(device=device)
    for name, buffer in buffers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, buffer)
    materialize(model, device, lambda _: dtype)
    _load(model, read)


def _load(model: LanguageModel, read: Read) -> None:
    for name, parameter in model.named_parameters():
        part = held_slices(tuple(parameter.shape), parameter)
        local_part(parameter).copy_(read(canonical_name(name))[part])
