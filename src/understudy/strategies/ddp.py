"""Distributed data parallel: every rank holds everything, gradients are all-reduced in buckets during the backward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from understudy.contracts import Batch, LossSum, Objective
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
        materialize(module, self.device, self.precision.held_in)
        compute_in(module, self.precision.compute)
        self._wrapped: DistributedDataParallel | None = None
        if self.world.size > 1:
            self._wrapped = DistributedDataParallel(
                module, broadcast_buffers=False, gradient_as_bucket_view=True, init_sync=False
            )
        self._ordered = False
        self.module = self._wrapped or module
        self.optimizer = make_optimizer(self._parameters().items())

    def forward_backward(self, micro_batches: Sequence[Batch], objective: Objective, num_tokens: int) -> LossSum:
        if self._wrapped is not None and not self._ordered:
            self._order_buckets(objective)
        return super().forward_backward(micro_batches, objective, num_tokens)

    def _order_buckets(self, objective: Objective) -> None:
        """Has DDP order its buckets now: it does so after the first backward pass, by when gradients came, and sums of
        more than two ranks round by their place in a bucket. Else the first step would round in another way than the
        later ones, and a run that resumed could not repeat a later one to the bit. Nothing random is drawn."""
        self._ordered = True
        self.module.eval()
        part = objective.loss(self.module, objective.prepare(Batch.of([]).to(self.device)))
        self._backward(part.loss)
        self._clear_gradients()

    def _accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last or self._wrapped is None else self._wrapped.no_sync()
