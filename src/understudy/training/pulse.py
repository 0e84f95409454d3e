"""A process's pulse: once a second, while it trains, it tells how far it is and in which collective."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from understudy.launch.pulses import Collective, Pulse, write_pulse
from understudy.launch.run_directory import RunDirectory
from understudy.recipe.environment import host_name
from understudy.training.failure import StepNote

__all__ = ["beating", "entered_collectives"]

BEAT_SECONDS = 1.0


@contextmanager
def beating(directory: RunDirectory, rank: int, note: StepNote) -> Iterator[None]:
    """While inside, a thread writes pulses, and SIGUSR2 has all stacks written to a file, by a handler that needs no
    interpreter."""
    path, ended = directory.pulse(rank), threading.Event()

    def beat() -> None:
        count = 0
        while not ended.is_set():
            count += 1
            pulse = Pulse(rank, host_name(), os.getpid(), count, note.step, note.times_given, entered_collectives())
            with suppress(OSError):  # a full disk
                write_pulse(path, pulse)
            ended.wait(BEAT_SECONDS)

    with directory.stacks(rank).open("w", encoding="utf-8") as stacks:
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        thread = threading.Thread(target=beat, name="pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            path.unlink(missing_ok=True)
            faulthandler.unregister(signal.SIGUSR2)
            if os.fstat(stacks.fileno()).st_size == 0:  # nobody asked
                directory.stacks(rank).unlink(missing_ok=True)


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
