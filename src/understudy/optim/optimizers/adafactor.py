"""Adafactor (Shazeer & Stern, 2018): second moments factored into rows and columns, so nearly no optimizer memory."""

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
    """The learning rate is relative: it scales with each parameter's own root mean square. `betas` and `eps` of the
    recipe belong to Adam and are not used."""
    return torch.optim.Adafactor(
        decay_groups(named_parameters, optimizer.weight_decay), lr=optimizer.learning_rate, foreach=False
    )
