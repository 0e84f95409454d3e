"""A process's pulse: once a second, and as it begins something else, it tells how far it is and in which collective."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from understudy.launch.pulses import Collective, Pulse, write_pulse
from understudy.launch.run_directory import RunDirectory
from understudy.recipe.environment import host_name
from understudy.training.headway import Headway

__all__ = ["beating", "entered_collectives"]

BEAT_SECONDS = 1.0
COMPUTING = 0.05
"""Of a core: a process that uses less does nothing but wait."""


@contextmanager
def beating(directory: RunDirectory, rank: int, headway: Headway) -> Iterator[None]:
    """While inside, a thread writes pulses, and SIGUSR2 has all stacks written to a file, by a handler that needs no
    interpreter."""
    path, ended = directory.pulse(rank), False

    def beat() -> None:
        computing, count = _Computing(), 0
        while not ended:
            headway.changed.clear()
            count += 1
            collectives = entered_collectives()
            waits = any(not one.done for one in collectives)
            if computing.since_last() and headway.shown_by_computing and not waits:
                headway.mark()
            pulse = Pulse(
                rank, host_name(), os.getpid(), count, headway.phase, headway.step, headway.marks, collectives
            )
            with suppress(OSError):  # a full disk
                write_pulse(path, pulse)
            headway.changed.wait(BEAT_SECONDS)

    with directory.stacks(rank).open("w", encoding="utf-8") as stacks:
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        thread = threading.Thread(target=beat, name="pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended = True
            headway.changed.set()
            thread.join()
            path.unlink(missing_ok=True)
            faulthandler.unregister(signal.SIGUSR2)
            if os.fstat(stacks.fileno()).st_size == 0:  # nobody asked
                directory.stacks(rank).unlink(missing_ok=True)


class _Computing:
    """Whether this process computes, the thread that asks left out."""

    def __init__(self) -> None:
        self._last = self._now()

    def since_last(self) -> bool:
        (used_before, at_before), (used, at) = self._last, self._now()
        self._last = used, at
        return used - used_before >= COMPUTING * (at - at_before)

    def _now(self) -> tuple[float, float]:
        return time.process_time() - time.thread_time(), time.monotonic()


def entered_collectives() -> tuple[Collective, ...]:
    """The last that this process entered of each group, the latest at the end, as the flight recorder of
    torch.distributed tells; empty where it does not: an older PyTorch, or a recorder that is off."""
    dump = getattr(getattr(dist, "_distributed_c10d", None) or _c10d(), "_dump_fr_trace_json", None)
    if dump is None:
        return ()
    last: dict[str, Collective] = {}
    for entry in json.loads(dump()).get("entries", ()):
        if entry.get("is_p2p"):
            continue
        group = str(entry["process_group"][0])
        name = str(entry["profiling_name"]).partition(":")[2] or str(entry["profiling_name"])
        sizes = tuple(tuple(map(int, size)) for size in entry["input_sizes"])
        last.pop(group, None)
        last[group] = Collective(
            group, int(entry["collective_seq_id"]), name, sizes, entry["state"] == "completed" or bool(entry["retired"])
        )
    return tuple(last.values())


def _c10d() -> object:
    from torch._C import _distributed_c10d

    return _distributed_c10d
