"""Fully sharded data parallel (FSDP2): each decoder layer is a unit, the embedding, last norm and head the root's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from understudy.models.language_model import LanguageModel
from understudy.parallel.world import World
from understudy.recipe.schema import FSDP, Recipe
from understudy.strategies.base import MakeModel, MakeOptimizer
from understudy.strategies.precision import Precision
from understudy.strategies.torch_native import TorchStrategy

__all__ = ["FSDPStrategy", "make"]


def make(recipe: Recipe, device: torch.device, world: World, precision: Precision) -> FSDPStrategy:
    return FSDPStrategy(recipe, device, world, precision)


class FSDPStrategy(TorchStrategy):
    """Parameters, gradients and optimizer state are sharded over ranks along their first dimension.

    Gradients are reduced after each micro-batch and accumulated sharded, in the dtype of the master weights: a whole
    gradient never exists outside the unit being reduced.
    """

    def __init__(self, recipe: Recipe, device: torch.device, world: World, precision: Precision) -> None:
        super().__init__(device, world, precision)
        self.settings = cast(FSDP, recipe.strategy)
        self.replicate = recipe.parallel.replicate

    def _mesh(self) -> DeviceMesh:
        if self.settings.sharding in ("full_shard", "shard_grad_op"):
            return init_device_mesh(self.device.type, (self.world.size,))
        replicate = self.world.size if self.settings.sharding == "no_shard" else self.replicate
        shape = (replicate, self.world.size // replicate)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def build(self, make_model: MakeModel, make_optimizer: MakeOptimizer) -> None:
        module = cast(LanguageModel, make_model())
        for parameter in module.parameters():
            parameter.data = parameter.data.to(self.precision.held_in(parameter))
        mesh = self._mesh()
        mixed = MixedPrecisionPolicy(param_dtype=self.precision.compute, reduce_dtype=torch.float32)
        pin = self.device.type != "cpu"
        offload = CPUOffloadPolicy(pin_memory=pin) if self.settings.offload else OffloadPolicy()
        reshard = self.settings.sharding in ("full_shard", "hybrid_shard")
        buffers = dict(module.named_buffers())
        for unit in (*module.decoder_layers(), module):
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, mp_policy=mixed, offload_policy=offload)
        # Sharding on the meta device and allocating afterwards means no rank ever holds a whole parameter.
        module.to_empty(device="cpu" if self.settings.offload else self.device)
        for name, buffer in buffers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, buffer.to(self.device))
        self.module = module
        self._units: list[Any] = [*module.decoder_layers(), module]
        self.optimizer = make_optimizer(self._parameters().items())

    @contextmanager
    def _inferring(self) -> Iterator[None]:
        with super()._inferring():
            yield
        # Where parameters stay whole until the backward pass, none comes, and a save would find wholes.
        for unit in self._units:
            unit.reshard()
