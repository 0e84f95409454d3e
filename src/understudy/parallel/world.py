"""The process group of a run: who this process is, how it enters, and how it leaves in order."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from understudy.parallel.meeting import meeting
from understudy.recipe.environment import ProcessEnvironment

__all__ = ["World", "process_group"]

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longest wait in a collective. Nothing slow runs behind one (P7); this bounds a hang, and leaves room for a save."""


@dataclass(frozen=True)
class World:
    """This process's place on the data-parallel axis."""

    rank: int
    size: int
    local_rank: int
    local_size: int


@contextmanager
def process_group(environment: ProcessEnvironment, device: torch.device, backend: str) -> Iterator[World]:
    """Enters the default process group and leaves it with a barrier, so that no rank closes a connection another still
    reads from. After an exception there is no barrier: the peers may be gone. Every rank must enter and leave.

    A host backend is added beside an accelerator's, for tensors that live in host memory (offload).
    """
    world = World(environment.rank, environment.world_size, environment.local_rank, environment.local_world_size)
    # DeepSpeed and torch look these up themselves; srun and in-process runs do not set them.
    place = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    added = [name for name in place if name not in os.environ]
    os.environ.update({name: str(place[name]) for name in added})
    with meeting(environment, COLLECTIVE_TIMEOUT) as store:
        dist.init_process_group(
            backend if device.type == "cpu" else f"cpu:gloo,{device.type}:{backend}",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=None if device.type == "cpu" else device,
        )
        try:
            yield world
            dist.barrier()
        finally:
            # Cycles in FSDP2's and DeepSpeed's objects keep gloo's threads alive past the group; such a thread, met by
            # the interpreter's exit, aborts the process.
            gc.collect()
            dist.destroy_process_group()
            for name in added:  # else a command started from here would take itself for one of the group
                os.environ.pop(name, None)
