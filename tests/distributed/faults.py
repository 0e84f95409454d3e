"""Faults that strike one rank in the midst of a training step."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from understudy.strategies.base import ModuleStrategy

STEP = 4


def plant(fault: str, rank: int, note: Path) -> None:
    """In workers that are forked from the process which this is called in. It strikes once: when, `note` tells."""
    compute, steps = ModuleStrategy.forward_backward, 0

    def forward_backward(self: ModuleStrategy, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == STEP and os.environ["RANK"] == str(rank) and not note.exists():
            note.write_text(str(time.time()))
            FAULTS[fault](self)
        return compute(self, *arguments)

    ModuleStrategy.forward_backward = forward_backward  # type: ignore[method-assign]


def fail(error: BaseException) -> Callable[[Any], None]:
    def failing(_: Any) -> None:
        raise error

    return failing


def cut_connections(_: Any) -> None:
    """All that this process has to its peers."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as held:
            held.getpeername()  # one that only listens has none
            if held.family in (socket.AF_INET, socket.AF_INET6):
                held.shutdown(socket.SHUT_RDWR)


def skip_collectives(strategy: Any) -> None:
    """Those of DDP's gradients, in this step."""
    strategy._accumulating = lambda *, last: strategy._wrapped.no_sync()


def stop(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)  # it is made to go on, to leave its stacks


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has none free.")
FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk")

FAULTS: dict[str, Callable[[Any], object]] = {
    "exception": fail(ValueError("planted")),
    "sys.exit": fail(SystemExit(0)),
    "exit 0": lambda _: os._exit(0),
    "exit 3": lambda _: os._exit(3),
    "killed": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "aborted": lambda _: os.abort(),
    "out of memory": fail(OUT_OF_MEMORY),
    "full disk": fail(FULL_DISK),
    "connections cut": cut_connections,
    "stopped": stop,
    "lock held": lambda _: re.match("(a+)+$", "a" * 64 + "b"),
    "asleep": lambda _: time.sleep(600),
    "collective skipped": skip_collectives,
    "another collective": lambda _: dist.all_gather([torch.zeros(5) for _ in range(3)], torch.zeros(5)),
}
