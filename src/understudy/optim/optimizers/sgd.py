"""Stochastic gradient descent with heavy-ball momentum; weight decay is decoupled like everyone else's here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from understudy.optim.groups import decay_groups
from understudy.optim.shards import over_local_shards
from understudy.recipe.schema import Optimizer

__all__ = ["make"]


def make(
    optimizer: Optimizer, named_parameters: Sequence[tuple[str, nn.Parameter]], *, fused: bool
) -> torch.optim.Optimizer:
    # PyTorch's SGD couples weight decay to the gradient, which a recipe's `weight_decay` must not mean here.
    from optimi import SGD

    return over_local_shards(
        decay_groups(named_parameters, optimizer.weight_decay),
        lambda groups: SGD(groups, lr=optimizer.learning_rate, momentum=optimizer.momentum, decouple_wd=True),
    )
