"""A process group of any size with one process in it: collectives end at once and change nothing."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # registers collectives for tensors without memory
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from understudy.parallel.world import World

__all__ = ["GlooCopies", "answer_reducer", "simulated_group"]


@contextmanager
def simulated_group(size: int) -> Iterator[World]:
    """Enters a default process group of `size` as its rank 0. None may exist in this process."""
    world = World(rank=0, size=size, local_rank=0, local_size=size)
    # DeepSpeed looks these up.
    place = {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in place}
    os.environ.update(place)
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield world
    finally:
        gc.collect()
        dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


class GlooCopies(TorchDispatchMode):
    """Inside, what is summed and dealt out is copied first, as gloo does (`ProcessGroupGloo`, 2.13): it all-reduces the
    copy, and takes the process's part out of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # its local part comes by itself
        copy = args[1].clone() if function is torch.ops.c10d._reduce_scatter_base_.default else None
        done = function(*args, **(kwargs or {}))
        del copy
        return done


def answer_reducer(module: nn.Module) -> None:
    """DDP waits for what a collective gives back, and a simulated one gives nothing: its buckets are told that they are
    reduced as they are. Without effect on any other module."""
    if isinstance(module, DistributedDataParallel):
        module.register_comm_hook(None, lambda state, bucket: _as_it_is(bucket.buffer()))


def _as_it_is(buffer: Tensor) -> torch.futures.Future[Tensor]:
    reduced: torch.futures.Future[Tensor] = torch.futures.Future()
    reduced.set_result(buffer)
    return reduced
