"""Names ranks that are slow, by when they enter collectives and the others do. Imports no torch."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from statistics import median

from understudy.launch.hangs import look_seconds
from understudy.launch.pulses import Pulse, read_pulse
from understudy.launch.run_directory import RunDirectory

__all__ = ["StragglerWatch"]

LOOK_SECONDS = 1.0
SLICE_SECONDS, SLICE_STEPS = 2.0, 3
"""A slice of time is at least so long, and so many steps."""
SLICES = 5
"""A rank that is slow in so many on end is named: any is, now and then."""
SHARE, LEAST_SECONDS = 0.2, 0.05
"""Of its time, and of each step, that the others must wait for a rank to call it slow."""
KEPT_SECONDS = 30.0
"""For all ranks to tell of a collective."""
MICROSECONDS = 1e6

Interval = tuple[float, float]


class StragglerWatch:
    """Asked many times a second while processes run: calls `say` with a sentence, once, about each rank of `world_size`
    that the others wait for a good part of the time. The sentence goes to a log of the run too.

    In a collective each waits for the one that enters it last. What a rank is late in it, compared with the median of
    the others, they have waited; that a rank is late by in several at the same time counts once. On several hosts a
    rank that is late in all of them alike is not late: its clock is.
    """

    def __init__(
        self,
        directory: RunDirectory,
        world_size: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._ranks = range(world_size)
        self._say = say
        self._clock = clock
        self._look_at = 0.0
        self._groups: dict[str, _Group] = defaultdict(_Group)
        self._slice = _Slice()
        self._slow: dict[int, int] = {}
        """In how many slices on end each was."""
        self._named: set[int] = set()

    def __call__(self) -> None:
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + max(LOOK_SECONDS, look_seconds(len(self._ranks)))
        told = (read_pulse(self._directory.pulse(rank)) for rank in self._ranks)
        pulses = {pulse.rank: pulse for pulse in told if pulse is not None}
        steps = [pulse.step_seconds for pulse in pulses.values() if pulse.step_seconds is not None]
        if len(pulses) < 2 or not steps:
            return
        horizon = min(pulse.time_seconds for pulse in pulses.values())
        for pulse in pulses.values():
            for group, entered in pulse.entered.items():
                self._groups[group].add(pulse.rank, entered)
        for one in self._groups.values():
            one.move_to(self._slice, horizon)
        step_seconds = median(steps)
        if self._slice.seconds >= max(SLICE_SECONDS, SLICE_STEPS * step_seconds):
            self._judge(pulses, step_seconds)
            self._slice = _Slice()

    def _judge(self, pulses: dict[int, Pulse], step_seconds: float) -> None:
        clocks_differ = len({pulse.host for pulse in pulses.values()}) > 1
        for rank, pulse in pulses.items():
            waited = self._slice.share(rank, clocks_differ=clocks_differ) * step_seconds
            slow = waited >= max(SHARE * step_seconds, LEAST_SECONDS)
            self._slow[rank] = self._slow.get(rank, 0) + 1 if slow else 0
            if self._slow[rank] >= SLICES and rank not in self._named:
                self._named.add(rank)
                self._tell(
                    f"rank {rank} on {pulse.host} is slow: the others wait {waited:.2f} s for it in each step of "
                    f"{step_seconds:.2f} s"
                )

    def _tell(self, sentence: str) -> None:
        self._say(sentence)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with suppress(OSError), self._directory.slow_ranks.open("a", encoding="utf-8") as log:  # a full disk
            log.write(f"{when} {sentence}\n")


class _Group:
    """Collectives of a process group that have not been judged: when each rank entered them, in seconds."""

    def __init__(self) -> None:
        self._members: set[int] = set()
        self._entered: dict[int, dict[int, float]] = {}
        self._judged = 0
        """The last number."""

    def add(self, rank: int, entered: Iterable[tuple[int, int]]) -> None:
        self._members.add(rank)
        for number, microseconds in entered:
            if number >= self._judged:
                self._entered.setdefault(number, {})[rank] = microseconds / MICROSECONDS

    def move_to(self, into: _Slice, horizon: float) -> None:
        """Those that every member has told of, up to `horizon`, which all pulses reach to."""
        whole = sorted(
            number
            for number, times in self._entered.items()
            if len(times) == len(self._members) > 1 and max(times.values()) <= horizon
        )
        for number, following in pairwise(whole):
            if following == number + 1:
                into.add(self._entered[number], min(self._entered[following].values()))
        self._judged = whole[-1] if whole else self._judged
        self._entered = {
            number: times
            for number, times in self._entered.items()
            if number >= self._judged and max(times.values()) > horizon - KEPT_SECONDS
        }


class _Slice:
    """Of time: when the others waited for each rank."""

    def __init__(self) -> None:
        self._covered: list[Interval] = []
        self._waits: dict[int, list[Interval]] = defaultdict(list)

    @property
    def seconds(self) -> float:
        """That are known of."""
        return _length(self._covered)

    def add(self, entered: dict[int, float], until: float) -> None:
        """A collective; the next one was entered first at `until`."""
        self._covered.append((min(entered.values()), until))
        in_order = sorted(entered.values())
        for rank, at in entered.items():
            self._waits[rank].append((_median_without(at, in_order), at))

    def share(self, rank: int, *, clocks_differ: bool) -> float:
        """Of the time, in which the others waited for `rank`."""
        waits, always = self._waits[rank], 0.0
        if clocks_differ and waits:
            always = max(0.0, sorted(end - begin for begin, end in waits)[len(waits) // 10])
        return min(1.0, _length([(begin + always, end) for begin, end in waits]) / self.seconds)


def _median_without(one: float, in_order: Sequence[float]) -> float:
    """The median of all but `one`, which is among them: hundreds of ranks, each a collective, are not sorted anew."""
    place, half = bisect_left(in_order, one), (len(in_order) - 1) // 2
    upper = in_order[half + (half >= place)]
    if len(in_order) % 2 == 0:
        return upper
    return (in_order[half - 1 + (half - 1 >= place)] + upper) / 2


def _length(intervals: Sequence[Interval]) -> float:
    """Of their union, empty ones left out."""
    length, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        length += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return length
