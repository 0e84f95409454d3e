"""Stochastic gradient descent with heavy-ball momentum; weight decay is decoupled like everyone else's here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from understudy.optim.elementwise import ElementwiseOptimizer
from understudy.optim.groups import decay_groups
from understudy.optim.shards import over_local_shards
from understudy.recipe.schema import Optimizer

__all__ = ["SGD", "make"]


def make(
    optimizer: Optimizer, named_parameters: Sequence[tuple[str, nn.Parameter]], *, fused: bool
) -> torch.optim.Optimizer:
    settings = {"lr": optimizer.learning_rate, "momentum": optimizer.momentum}
    return over_local_shards(decay_groups(named_parameters, optimizer), lambda groups: SGD(groups, settings))


class SGD(ElementwiseOptimizer):
    """PyTorch's own couples weight decay to the gradient, which a recipe's `weight_decay` does not mean."""

    def change(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        lr: float = group["lr"]
        momentum: float = group["momentum"]
        if momentum == 0:
            return grad * -lr
        before = state["momentum_buffer"].float() if state else torch.zeros_like(grad)
        state["momentum_buffer"] = grad + before * momentum
        return state["momentum_buffer"] * -lr
