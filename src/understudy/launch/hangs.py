"""Finds hangs by the pulses that processes leave in the run directory, and names who is late. Imports no torch."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from understudy.launch.cause import HangError
from understudy.launch.last_collectives import LastCollective, in_ranges, with_collectives
from understudy.launch.pulses import PHASES, SAVING, Collective, Pulse, beat_seconds, read_pulse
from understudy.launch.run_directory import RunDirectory
from understudy.recipe.environment import host_name

__all__ = ["HangWatch", "late_ranks", "look_seconds"]

LOOK_SECONDS = 0.5
LOOKS_A_SECOND = 200
"""At most so many pulses: on a disk that hosts share each is a question to its server."""
STILL_BEATS = 5
"""A process that tells nothing for so long cannot run Python."""
COME_SECONDS = 180.0
"""Processes may take so long to come, however soon a hang is to be found: they import torch first."""
GAP_SECONDS = 5.0
"""Most that counts of the time between two looks: when it was longer the watcher was stopped, with all of its job."""
OTHERS_SECONDS = 2.0
"""The host of a late rank speaks first: it alone knows whether that one is stopped, and has its stacks written."""
STACK_SECONDS = 0.2
"""For processes to write their stacks, which they do not tell of, before they are killed."""
WORLD = ":0"
"""At the end of what the group of all processes is called."""


def look_seconds(pulses: int) -> float:
    """Between two looks at so many pulses."""
    return max(LOOK_SECONDS, pulses / LOOKS_A_SECOND)


def late_ranks(pulses: Sequence[Pulse]) -> dict[int, str]:
    """Those that the others wait for, in a collective or before it, each with what it did instead; empty where nobody
    can tell."""
    late: dict[int, str] = {}
    for group in sorted({one.group for pulse in pulses for one in pulse.collectives}):
        late |= _late_in(group, pulses)
    return late or _behind(pulses)


def _late_in(group: str, pulses: Sequence[Pulse]) -> dict[int, str]:
    ranks = {pulse.rank: one for pulse in pulses for one in pulse.collectives if one.group == group}
    foremost = max(one.number for one in ranks.values())
    ahead = {rank: one for rank, one in ranks.items() if one.number == foremost}
    if all(one.done for one in ahead.values()):
        return {}
    behind = {rank: f"; its last {_in_words(one)}" for rank, one in ranks.items() if one.number < foremost}
    if group.endswith(WORLD):
        behind |= {pulse.rank: "" for pulse in pulses if pulse.rank not in ranks}
    if behind:
        wait = "waits" if len(ahead) == 1 else "wait"
        name = next(iter(ahead.values())).name
        missed = f"has not entered {name} {foremost}, which {in_ranges(ahead)} {wait} in"
        return {rank: missed + was for rank, was in behind.items()}
    (usual, times), *others = Counter((one.name, one.sizes) for one in ahead.values()).most_common()
    if not others or times == 1:
        return {}
    return {
        rank: f"went another way: it entered {one.name} as its collective {foremost} where the others entered "
        f"{usual[0]}"
        for rank, one in ahead.items()
        if (one.name, one.sizes) != usual
    }


def _behind(pulses: Sequence[Pulse]) -> dict[int, str]:
    """Those that are at something earlier than others."""
    furthest = max((_place(pulse) for pulse in pulses), default=0)
    ahead = {pulse.rank: pulse for pulse in pulses if _place(pulse) == furthest}
    return {
        pulse.rank: f"has not got to {PHASES[furthest]}, as {in_ranges(ahead)} {'has' if len(ahead) == 1 else 'have'}"
        for pulse in pulses
        if pulse.rank not in ahead
    }


class HangWatch:
    """Asked many times a second while processes run: returns an error once no rank of `world_size` has got on for
    `hang_seconds`, from the moment on that they are started until they have saved their model. Late ranks of this host
    leave their stacks.

    What the processes of other hosts tell is looked at only while those of this one do not get on.
    """

    def __init__(
        self,
        directory: RunDirectory,
        world_size: int,
        hang_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._ranks = range(world_size)
        self._hang_seconds = hang_seconds
        self._looked_at = clock()
        self._look_in = 0.0
        self._watched = 0.0
        """Seconds that this watch ran."""
        self._moved = 0.0
        """When, of these, somebody got on."""
        self._here: Sequence[int] = self._ranks
        """Ranks of this host; all, while there are some whose host is not known."""
        self._looked: Sequence[int] = ()
        """Ranks that were looked at last."""
        self._told: dict[int, Pulse | None] = {}
        self._beats: dict[int, float] = {}
        """When each last told anything new."""
        self._furthest = 0
        """Place in `PHASES` that any has come to."""

    def __call__(self) -> HangError | None:
        now = self._clock()
        gap = now - self._looked_at
        if gap < self._look_in:
            return None
        self._looked_at, self._watched = now, self._watched + min(gap, GAP_SECONDS)
        still = self._watched - self._moved
        ranks = self._ranks if still > self._hang_seconds / 2 else self._here
        self._look_in = min(look_seconds(len(ranks)), self._hang_seconds / 4)
        if self._look(ranks) or not self._told_of_any():
            self._moved = self._watched
            return None
        limit = max(self._hang_seconds, COME_SECONDS) if self._missing() else self._hang_seconds
        if still <= limit:
            return None
        late = self._late()
        speakers = late or {0: ""}
        if still <= limit + OTHERS_SECONDS and not any(rank in self._here for rank in speakers):
            return None
        return self._hang(late)

    def _look(self, ranks: Sequence[int]) -> bool:
        """Whether any has got on."""
        moved = False
        for rank in ranks:
            pulse, before = read_pulse(self._directory.pulse(rank)), self._told.get(rank)
            if pulse is not None:
                self._furthest = max(self._furthest, _place(pulse))
                if before is None or (before.process, before.beat) != (pulse.process, pulse.beat):
                    self._beats[rank] = self._watched
            moved = moved or (rank in self._looked and _progress(before) != _progress(pulse))
            self._told[rank] = pulse
        self._looked = ranks
        if all(self._told.get(rank) for rank in self._ranks):
            here = host_name()
            self._here = [rank for rank, pulse in self._told.items() if pulse and pulse.host == here] or self._ranks
        return moved

    def _told_of_any(self) -> bool:
        """Whether there is anybody to be watched: who has come to the end tells nothing any more."""
        return any(self._told.values()) or not self._ending

    @property
    def _ending(self) -> bool:
        """Whether those that tell nothing may have come to the end."""
        return self._furthest >= PHASES.index(SAVING)

    def _missing(self) -> list[int]:
        """Those that have not come."""
        return [] if self._ending else [rank for rank in self._ranks if not self._told.get(rank)]

    def _pulses(self) -> dict[int, Pulse]:
        return {rank: pulse for rank, pulse in self._told.items() if pulse is not None}

    def _late(self) -> dict[int, str]:
        """Of those that have come, each with what it did instead of getting on."""
        pulses, still = self._pulses(), self._still()
        if still or self._missing():
            return {rank: _why_still(pulses[rank]) for rank in still}
        return late_ranks(list(pulses.values()))

    def _still(self) -> list[int]:
        """Those that have come and no longer tell anything."""
        allowed = min(STILL_BEATS * beat_seconds(len(self._ranks)), self._hang_seconds)
        return [rank for rank in self._pulses() if self._watched - self._beats[rank] >= allowed]

    def _hang(self, late: Mapping[int, str]) -> HangError:
        pulses, missing, still = self._pulses(), self._missing(), self._still()
        last = [
            LastCollective(rank, one.host, one.collectives[-1], rank not in still)
            for rank, one in pulses.items()
            if one.collectives
        ]
        # The last pulses of those are of before they stood; the others came as far with them.
        furthest = max((one.step for one in pulses.values() if one.step is not None), default=None)
        pulses |= {rank: replace(pulses[rank], step=furthest) for rank in still if pulses[rank].step is not None}
        self._leave_stacks([pulses[rank] for rank in late] or pulses.values())
        said = [self._sentence(pulses[rank], what) for rank, what in late.items()]
        if missing:
            have = "has" if len(missing) == 1 else "have"
            said.insert(0, f"{in_ranges(missing)} {have} not come, and left no sign in {self._directory.logs}")
        if not said:
            waiting = "; ".join(self._sentence(pulse, "") for pulse in list(pulses.values())[:4])
            said = [f"no rank is late; all wait: {waiting}"]
        message = f"no rank got on for {self._hang_seconds:g} s: {'; '.join(said)}."
        return HangError(with_collectives(message, last))

    def _sentence(self, pulse: Pulse, what: str) -> str:
        when = f" while {pulse.phase}" if pulse.step is None else f" after step {pulse.step}"
        stacks = self._directory.stacks(pulse.rank)
        return f"rank {pulse.rank} on {pulse.host}{when}{' ' + what if what else ''} (stacks in {stacks})"

    def _leave_stacks(self, pulses: Iterable[Pulse]) -> None:
        here = host_name()
        for pulse in pulses:
            if pulse.host == here:
                with suppress(ProcessLookupError):
                    os.kill(pulse.process, signal.SIGUSR2)
                    os.kill(pulse.process, signal.SIGCONT)  # a stopped one leaves its stacks as it goes on
        time.sleep(STACK_SECONDS)


def _progress(pulse: Pulse | None) -> Any:
    return pulse and (pulse.process, pulse.phase, pulse.step, pulse.marks, pulse.collectives)


def _place(pulse: Pulse) -> int:
    return PHASES.index(pulse.phase)


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
