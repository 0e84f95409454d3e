"""Lion (Chen et al., 2023): the sign of an interpolated momentum. Wants a learning rate 3 to 10 times below AdamW's."""

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
    # Imported here: the package takes part of a second and only its own optimizers need it.
    from optimi import Lion

    return over_local_shards(
        decay_groups(named_parameters, optimizer.weight_decay),
        lambda groups: Lion(groups, lr=optimizer.learning_rate, betas=optimizer.betas),
    )
