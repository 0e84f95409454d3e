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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from understudy.strategies.base import ModuleStrategy

STEP = 4
HANG_SECONDS = 3.0


def plant(fault: str, rank: int, note: Path) -> None:
    """In workers that are forked from the process which this is called in. It strikes once: when, `note` tells."""
    compute, steps = ModuleStrategy.forward_backward, 0

    def forward_backward(self: ModuleStrategy, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == STEP and os.environ["RANK"] == str(rank) and not note.exists():
            note.write_text(str(time.time()))
            FAULTS[fault].strike(self)
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


WHO = "rank {rank} on {host}"
LOG = r"\S+/logs/rank-{rank}\.log"
RAISED = rf"\({WHO}, after step {STEP - 1}; traceback in {LOG}\)"
LATE = rf"no rank got on for {HANG_SECONDS:g} s: {WHO} (?:after step \d|while training)"


@dataclass(frozen=True)
class Fault:
    strike: Callable[[Any], object]
    """Given the strategy."""
    status: int
    """What the run ends with."""
    said: str
    """A pattern for the sentence, up to the last collectives of all ranks."""

    def line(self, rank: int, host: str, seen: str = f"after step {STEP - 1}") -> str:
        """A pattern for the line that tells. `seen` is where a rank was that did not say so itself."""
        last = "" if self.status == 2 else r"[.;] [lL]ast collectives: [^\n]+"
        return f"error: {self.said.format(rank=rank, host=re.escape(host), seen=seen)}{last}\\."


FAULTS = {
    "exception": Fault(fail(ValueError("planted")), 1, rf"ValueError: planted {RAISED}"),
    "exit 0": Fault(lambda _: os._exit(0), 5, rf"{WHO} ended with status 0 {{seen}} without saying why; see {LOG}"),
    "killed": Fault(
        lambda _: os.kill(os.getpid(), signal.SIGKILL),
        5,
        rf"{WHO} was killed by SIGKILL {{seen}} \(most often [^)]+\); its output is in {LOG}",
    ),
    "out of memory": Fault(
        fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has none free.")),
        4,
        rf"out of memory: {WHO} ran out of memory, asking for 2\.00 GiB, after step {STEP - 1} with strategy ddp .*",
    ),
    "full disk": Fault(
        fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk")),
        2,
        rf"/full/disk: no space is left on the disk; [^(]* \({WHO}, after step {STEP - 1}\)",
    ),
    "connections cut": Fault(
        cut_connections,
        5,
        r"a connection between ranks was lost, and none of them failed before: RuntimeError: \w.*",
    ),
    "another collective": Fault(
        lambda _: dist.all_gather([torch.zeros(5) for _ in range(3)], torch.zeros(5)),
        5,
        rf"{LATE} went another way: it entered all_gather as its collective \d+ where .*",
    ),
    "collective skipped": Fault(
        skip_collectives, 1, rf"{WHO} skipped a collective, or entered another one than the others: {WHO} got .*"
    ),
    "stopped": Fault(stop, 5, rf"{LATE} is stopped \(SIGSTOP, or a debugger\).*"),
    "lock held": Fault(
        lambda _: re.match("(a+)+$", "a" * 64 + "b"),
        5,
        rf"{LATE} cannot run Python: something holds the interpreter's lock, .*",
    ),
    "asleep": Fault(lambda _: time.sleep(600), 5, rf"{LATE} has not entered all_reduce \d+, which .*"),
    "aborted": Fault(lambda _: os.abort(), 5, rf"{WHO} was killed by SIGABRT {{seen}}; its output is in {LOG}"),
    "sys.exit": Fault(fail(SystemExit(0)), 1, rf"SystemExit: 0 {RAISED}"),
    "exit 3": Fault(lambda _: os._exit(3), 5, rf"{WHO} ended with status 3 {{seen}} without saying why; see {LOG}"),
}
