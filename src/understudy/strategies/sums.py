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
    shapes = [parts[0].metrics[name].shape for name in names]
    rows = [[part.loss, part.num_tokens, *(part.metrics[name] for name in names)] for part in parts]
    total = torch.stack([torch.cat([value.detach().float().reshape(-1) for value in row]) for row in rows]).sum(0)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    sums = torch.split(total[2:], [shape.numel() for shape in shapes])
    metrics = {name: value.reshape(shape) for name, shape, value in zip(names, shapes, sums)}
    return LossSum(total[0], total[1].to(torch.int64), metrics)
