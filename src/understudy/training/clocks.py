"""How far clocks of hosts are apart."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from understudy.recipe.environment import host_name

__all__ = ["clock_lead_ns"]

ROUNDS = 9


def clock_lead_ns() -> int:
    """Nanoseconds that this process's clock is ahead of rank 0's; 0 on the host of rank 0. Wrong by no more than the
    time between the first rank to leave a small collective and the last. A collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hosts: list[str] = [""] * size
    dist.all_gather_object(hosts, host_name())
    if len(set(hosts)) == 1:
        return 0
    times = torch.zeros(ROUNDS, dtype=torch.int64)
    for number in range(ROUNDS):
        dist.all_reduce(torch.zeros(1))  # leaves all at one moment
        times[number] = time.time_ns()
    ours = times.clone()
    dist.broadcast(times, src=0)
    return 0 if hosts[rank] == hosts[0] else int((ours - times).median())
