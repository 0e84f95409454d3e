"""A process's pulse: once a second, and as it begins something else, it tells how far it is and in which collective."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from understudy.launch.pulses import PROVING, Collective, Pulse, beat_seconds, write_pulse
from understudy.launch.run_directory import RunDirectory
from understudy.recipe.environment import host_name
from understudy.training.headway import Headway

__all__ = ["REMEMBERED", "beating", "entered_collectives"]

REMEMBERED = 128
"""Collectives that the flight recorder is to keep; to ask it for 2,000, its own number, takes 60 ms."""
SPREAD, GOLDEN = 0.5, 0.618034
FIELDS = {"collective_seq_id", "input_sizes", "process_group", "profiling_name", "retired", "state", "time_created_ns"}
"""That are read of what the flight recorder tells of a collective."""
COMPUTING = 0.05
"""Of a core: a process that uses less does nothing but wait."""


@contextmanager
def beating(directory: RunDirectory, rank: int, world_size: int, headway: Headway) -> Iterator[None]:
    """While inside, a thread writes pulses, and SIGUSR2 has all stacks written to a file, by a handler that needs no
    interpreter. What is in that file stays: after a restart a user wants to know where the last start hung."""
    path, ended, between = directory.pulse(rank), False, beat_seconds(world_size)

    def beat() -> None:
        computing, count = _Computing(), 0
        while not ended:
            headway.changed.clear()
            count += 1
            recorded = _recorded()
            collectives, entered = _last_of(recorded), _entered_in_steps(recorded, headway)
            waits = headway.phase != PROVING and any(not one.done for one in collectives)
            if computing.since_last() and headway.shown_by_computing and not waits:
                headway.mark()
            now_ns = time.time_ns() - headway.clock_lead_ns
            pulse = Pulse(
                rank=rank,
                host=host_name(),
                process=os.getpid(),
                beat=count,
                phase=headway.phase,
                step=headway.step,
                marks=headway.marks,
                collectives=collectives,
                time_seconds=now_ns / 1e9,
                step_seconds=headway.step_seconds,
                entered=entered,
            )
            with suppress(OSError):  # a full disk
                write_pulse(path, pulse)
            headway.changed.wait(_until_next_beat(now_ns / 1e9, between))

    with directory.stacks(rank).open("a", encoding="utf-8") as stacks:
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


def _until_next_beat(now_seconds: float, between: float) -> float:
    """Ranks tell at the same time, so that they tell of the same collectives; and not always at the same moment of a
    step, one of which may take as long as this."""
    beat = int(now_seconds / between) + 1
    return (beat + SPREAD * (beat * GOLDEN % 1)) * between - now_seconds


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
    torch.distributed tells; empty where it does not: a PyTorch that tells otherwise, or a recorder that is off."""
    return _last_of(_recorded())


def _recorded() -> list[dict[str, Any]]:
    """Collectives that are remembered, in order. PyTorch keeps those of NCCL by themselves."""
    found: list[dict[str, Any]] = []
    for recorder in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        if (dump := getattr(_c10d(), recorder, None)) is not None:
            entries = json.loads(dump()).get("entries") or ()
            found += [entry for entry in entries if entry.keys() >= FIELDS and not entry.get("is_p2p")]
    return sorted(found, key=_time_ns)  # of one group they are sorted


def _last_of(recorded: Sequence[dict[str, Any]]) -> tuple[Collective, ...]:
    last: dict[str, Collective] = {}
    for entry in recorded:
        group, (_, name) = _group(entry), _kind(entry)
        sizes = tuple(tuple(map(int, size)) for size in entry["input_sizes"])
        last.pop(group, None)
        last[group] = Collective(
            group, int(entry["collective_seq_id"]), name, sizes, entry["state"] == "completed" or bool(entry["retired"])
        )
    return tuple(last.values())


def _entered_in_steps(recorded: Sequence[dict[str, Any]], headway: Headway) -> dict[str, list[tuple[int, int]]]:
    """See `Pulse.entered`. With gloo a collective is recorded as it is entered, with NCCL as it is queued."""
    entered: dict[str, list[tuple[int, int]]] = {}
    times = [_time_ns(entry) for entry in recorded]
    for entry, at, counts in zip(recorded, times, headway.within_steps(times)):
        if counts:
            told = entered.setdefault(_group(entry), [])
            told.append((int(entry["collective_seq_id"]), (at - headway.clock_lead_ns) // 1000))
    return entered


def _kind(entry: dict[str, Any]) -> tuple[str, str]:
    """The backend, and what it does."""
    backend, _, name = str(entry["profiling_name"]).rpartition(":")
    return backend, name


def _group(entry: dict[str, Any]) -> str:
    """A group of two backends counts the collectives of each."""
    backend, _ = _kind(entry)
    return f"{backend}:{entry['process_group'][0]}"


def _time_ns(entry: dict[str, Any]) -> int:
    return int(entry["time_created_ns"])


def _c10d() -> object:
    from torch._C import _distributed_c10d

    return _distributed_c10d
