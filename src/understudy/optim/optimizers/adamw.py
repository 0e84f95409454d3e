"""AdamW (Loshchilov & Hutter, 2019): Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from understudy.optim.groups import decay_groups
from understudy.recipe.schema import Optimizer

__all__ = ["make"]


def make(
    optimizer: Optimizer, named_parameters: Sequence[tuple[str, nn.Parameter]], *, fused: bool
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        decay_groups(named_parameters, optimizer),
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=fused,
    )
