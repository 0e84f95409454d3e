"""Finds hangs by the pulses that processes leave in the run directory, and names who is late. Imports no torch."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from understudy.errors import LostProcessError
from understudy.launch.run_directory import RunDirectory, replace_file
from understudy.recipe.environment import host_name

__all__ = ["Collective", "HangWatch", "Pulse", "late_ranks", "read_pulse", "write_pulse"]

LOOK_SECONDS = 0.5
STILL_SECONDS = 5.0
"""A pulse comes each second; one that stands still for so long comes from a process that cannot run Python."""
STACK_SECONDS = 0.2
"""For processes to write their stacks, which they do not tell of, before they are killed."""


@dataclass(frozen=True)
class Collective:
    """One that a process has entered."""

    group: str
    number: int
    """Of those of its group, from 1."""
    name: str
    sizes: tuple[tuple[int, ...], ...]
    done: bool


@dataclass(frozen=True)
class Pulse:
    """What a process tells once a second while it trains."""

    rank: int
    host: str
    process: int
    beat: int
    step: int | None
    """Optimizer steps done."""
    given: int
    """How often micro-batches were given to it."""
    collectives: tuple[Collective, ...]
    """The last of each group; empty where this PyTorch does not tell."""


def write_pulse(path: Path, pulse: Pulse) -> None:
    """Whole or not at all."""
    replace_file(path, json.dumps(asdict(pulse)).encode())


def read_pulse(path: Path) -> Pulse | None:
    """None where there is none, or none that can be read: the process does not train now."""
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    collectives = (
        Collective(one["group"], one["number"], one["name"], tuple(map(tuple, one["sizes"])), one["done"])
        for one in told.pop("collectives")
    )
    return Pulse(**told, collectives=tuple(collectives))


def late_ranks(pulses: Sequence[Pulse]) -> dict[int, str]:
    """Those that the others wait for in a collective, each with what it did instead; empty where nobody can tell."""
    late: dict[int, str] = {}
    entered: dict[str, dict[int, Collective]] = {}
    for pulse in pulses:
        for one in pulse.collectives:
            entered.setdefault(one.group, {})[pulse.rank] = one
    for ranks in entered.values():
        foremost = max(one.number for one in ranks.values())
        ahead = {rank: one for rank, one in ranks.items() if one.number == foremost}
        if all(one.done for one in ahead.values()):
            continue
        behind = {rank: one for rank, one in ranks.items() if one.number < foremost}
        if behind:
            waiting = next(iter(ahead.values()))
            for rank, one in behind.items():
                missed = f"has not entered {waiting.name} {foremost}, which {_ranks(ahead)} waits in"
                late[rank] = f"{missed}; its last {_in_words(one)}"
            continue
        (usual, times), *others = Counter((one.name, one.sizes) for one in ahead.values()).most_common()
        if others and times > 1:
            for rank, one in ahead.items():
                if (one.name, one.sizes) != usual:
                    entered_it = f"it entered {one.name} as its collective {foremost}"
                    late[rank] = f"went another way: {entered_it} where the others entered {usual[0]}"
    return late


class HangWatch:
    """Asked many times a second while processes run: returns an error once no rank of `world_size` has got on for
    `hang_seconds`. Until all train, and once one no longer does, nothing is said. Late ranks of this host leave their
    stacks."""

    def __init__(self, directory: RunDirectory, world_size: int, hang_seconds: float) -> None:
        self._directory = directory
        self._ranks = range(world_size)
        self._hang_seconds = hang_seconds
        self._look_at = 0.0
        self._progress: Any = None
        self._moved_at = time.monotonic()
        self._beats: dict[int, tuple[tuple[int, int], float]] = {}
        """By rank: process and beat, and since when it is that."""

    def __call__(self) -> LostProcessError | None:
        now = time.monotonic()
        if now < self._look_at:
            return None
        self._look_at = now + LOOK_SECONDS
        pulses = [read_pulse(self._directory.pulse(rank)) for rank in self._ranks]
        known = [pulse for pulse in pulses if pulse is not None]
        for pulse in known:
            beat = (pulse.process, pulse.beat)
            if self._beats.get(pulse.rank, (None,))[0] != beat:
                self._beats[pulse.rank] = (beat, now)
        progress = [(pulse.process, pulse.step, pulse.given, pulse.collectives) for pulse in known]
        if len(known) < len(self._ranks) or progress != self._progress:
            self._progress, self._moved_at = progress, now
            return None
        return self._hang(known, now) if now - self._moved_at > self._hang_seconds else None

    def _hang(self, pulses: Sequence[Pulse], now: float) -> LostProcessError:
        still = min(STILL_SECONDS, self._hang_seconds)
        late: dict[int, str] = {}
        for pulse in pulses:
            if now - self._beats[pulse.rank][1] >= still:
                late[pulse.rank] = _why_still(pulse)
        late = late or late_ranks(pulses)
        by_rank = {pulse.rank: pulse for pulse in pulses}
        self._leave_stacks([by_rank[rank] for rank in late] or list(pulses))
        said = [self._sentence(by_rank[rank], what) for rank, what in late.items()]
        if not said:
            said = [f"no rank is late; all wait: {'; '.join(self._sentence(pulse, '') for pulse in pulses[:4])}"]
        return LostProcessError(f"no rank got on for {self._hang_seconds:g} s: {'; '.join(said)}.")

    def _sentence(self, pulse: Pulse, what: str) -> str:
        when = "" if pulse.step is None else f" after step {pulse.step}"
        last = pulse.collectives[-1] if pulse.collectives else None
        was = "" if last is None or "last" in what or "another way" in what else f"; its last {_in_words(last)}"
        stacks = self._directory.stacks(pulse.rank)
        return f"rank {pulse.rank} on {pulse.host}{when}{' ' + what if what else ''}{was} (stacks in {stacks})"

    def _leave_stacks(self, pulses: Sequence[Pulse]) -> None:
        here = host_name()
        for pulse in pulses:
            if pulse.host == here:
                with suppress(ProcessLookupError):
                    os.kill(pulse.process, signal.SIGUSR2)
                    os.kill(pulse.process, signal.SIGCONT)  # a stopped one leaves its stacks as it goes on
        time.sleep(STACK_SECONDS)


def _why_still(pulse: Pulse) -> str:
    if pulse.host == host_name() and _state(pulse.process) in ("T", "t"):
        return "is stopped (SIGSTOP, or a debugger)"
    return "cannot run Python: something holds the interpreter's lock, or its disk does not answer"


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _in_words(one: Collective) -> str:
    return f"collective was {one.name} {one.number}, {'done' if one.done else 'not done'}"


def _ranks(ranks: Mapping[int, Any]) -> str:
    listed = ", ".join(map(str, sorted(ranks)[:8]))
    return f"rank {listed}{', …' if len(ranks) > 8 else ''}"
