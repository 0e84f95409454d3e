"""Distributed data parallel: every rank holds everything, gradients are all-reduced in buckets during the backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from understudy.parallel.world import World
from understudy.recipe.schema import Recipe
from understudy.strategies.base import MakeModel, MakeOptimizer, materialize
from understudy.strategies.precision import Precision, compute_in
from understudy.strategies.torch_native import TorchStrategy

__all__ = ["DDPStrategy", "make"]


def make(recipe: Recipe, device: torch.device, world: World, precision: Precision) -> DDPStrategy:
    return DDPStrategy(device, world, precision)


class DDPStrategy(TorchStrategy):
    """PyTorch's DistributedDataParallel; a single process is left unwrapped."""

    def build(self, make_model: MakeModel, make_optimizer: MakeOptimizer) -> None:
        module = make_model()
        materialize(module, self.device, self.precision.weights)
        compute_in(module, self.precision.compute)
        self._wrapped: DistributedDataParallel | None = None
        if self.world.size > 1:
            self._wrapped = DistributedDataParallel(
                module, broadcast_buffers=False, gradient_as_bucket_view=True, init_sync=False
            )
        self.module = self._wrapped or module
        self.optimizer = make_optimizer(self._parameters().items())

    def _accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last or self._wrapped is None else self._wrapped.no_sync()
