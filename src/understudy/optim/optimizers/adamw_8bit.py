"""AdamW with moments in 8 bits, quantised in blocks of 256 (Dettmers et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from understudy.errors import UserError
from understudy.optim.groups import decay_groups
from understudy.optim.shards import over_local_shards
from understudy.recipe.schema import Optimizer

__all__ = ["make"]

_SMALLEST_8BIT_SIZE = 4096
"""bitsandbytes' own default: tensors with fewer elements keep fp32 moments, whose size does not matter."""


def make(
    optimizer: Optimizer, named_parameters: Sequence[tuple[str, nn.Parameter]], *, fused: bool
) -> torch.optim.Optimizer:
    """Under FSDP the blocks, and the size below which moments stay fp32, are those of each rank's shard, so runs at
    different world sizes agree to the quantisation's accuracy only."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "optimizer `adamw_8bit` needs the package bitsandbytes; install it with `pip install bitsandbytes`, "
            "or choose `adamw` or `adamw_bf16`."
        ) from error
    return over_local_shards(
        decay_groups(named_parameters, optimizer.weight_decay),
        lambda groups: AdamW8bit(
            groups,
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            min_8bit_size=_SMALLEST_8BIT_SIZE,
        ),
    )
