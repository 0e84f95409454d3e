"""Lion (Chen et al., 2023): the sign of an interpolated momentum. Wants a learning rate 3 to 10 times below AdamW's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from understudy.optim.elementwise import ElementwiseOptimizer
from understudy.optim.groups import decay_groups
from understudy.optim.shards import over_local_shards
from understudy.recipe.schema import Optimizer

__all__ = ["Lion", "make"]


def make(
    optimizer: Optimizer, named_parameters: Sequence[tuple[str, nn.Parameter]], *, fused: bool
) -> torch.optim.Optimizer:
    settings = {"lr": optimizer.learning_rate, "betas": optimizer.betas}
    return over_local_shards(decay_groups(named_parameters, optimizer), lambda groups: Lion(groups, settings))


class Lion(ElementwiseOptimizer):
    """One moment: it steps along the sign of its average with the new gradient, then takes that in more slowly."""

    def change(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        beta1, beta2 = group["betas"]
        momentum = state["exp_avg"].float() if state else torch.zeros_like(grad)
        state["exp_avg"] = torch.lerp(momentum, grad, 1 - beta2)
        return torch.lerp(momentum, grad, 1 - beta1).sign_().mul_(-group["lr"])
