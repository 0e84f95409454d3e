"""Adding up the losses of micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from understudy.contracts import LossSum

__all__ = ["global_sum"]


def global_sum(parts: Sequence[LossSum]) -> LossSum:
    """The sum over micro-batches and ranks, in one all-reduce. A collective: every rank passes at least one part, with
    the same metrics. Counts stay exact up to 2^24 tokens a step, which fp32 holds."""
    names = sorted(parts[0].metrics)
    rows = torch.stack(
        [
            torch.stack([part.loss, part.num_tokens.to(part.loss.dtype), *(part.metrics[name] for name in names)])
            for part in parts
        ]
    )
    total = rows.detach().float().sum(0)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return LossSum(total[0], total[1].to(torch.int64), dict(zip(names, total[2:])))
