"""Which collective each rank was in when a run failed, in words that hundreds of ranks fit in. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.launch.cause import Cause, Misfit, read_cause
from understudy.launch.pulses import Collective, read_pulse
from understudy.launch.run_directory import RunDirectory

__all__ = ["LastCollective", "in_ranges", "in_words", "last_collectives", "other_ways", "with_collectives"]

MOST_GROUPS = 6
"""Of ranks that were in the same one; more are not told apart."""


@dataclass(frozen=True)
class LastCollective:
    """The last that a rank entered, as far as it told."""

    rank: int
    host: str
    collective: Collective
    at_failure: bool
    """It told as it failed, or the run did; else by its last pulse, of up to a second before it was killed or stood."""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> LastCollective:
        """From JSON."""
        return cls(**{**told, "collective": Collective.of(told["collective"])})


def last_collectives(directory: RunDirectory, ranks: Iterable[int]) -> list[LastCollective]:
    """Of each of `ranks` that told."""
    found = []
    for rank in ranks:
        told = read_cause(directory.cause(rank)) or read_pulse(directory.pulse(rank))
        if told is not None and told.collectives:
            found.append(LastCollective(rank, told.host, told.collectives[-1], isinstance(told, Cause)))
    return found


def in_words(last: Sequence[LastCollective]) -> str:
    """Such as `all_reduce 17 not done: ranks 0-6, 8; by its last pulse, all_gather 16 done: rank 7`."""
    several = len({one.collective.group for one in last}) > 1
    alike: dict[tuple[bool, str], list[int]] = {}
    for one in last:
        it = one.collective
        where = f" of group {it.group}" if several else ""
        words = f"{it.name} {it.number}{where} {'done' if it.done else 'not done'}"
        alike.setdefault((one.at_failure, words), []).append(one.rank)
    said: list[str] = []
    pulses_from: int | None = None
    for (at_failure, words), ranks in sorted(alike.items(), key=lambda item: (not item[0][0], -len(item[1]))):
        if not at_failure and pulses_from is None:
            pulses_from = len(said)
        said.append(f"{words}: {in_ranges(ranks)}")
    said = [*said[:MOST_GROUPS], *(["…"] if len(said) > MOST_GROUPS else [])]
    if pulses_from is not None and pulses_from < len(said):
        said[pulses_from] = f"by last pulses, {said[pulses_from]}"
    return "; ".join(said)


def with_collectives(message: str, last: Sequence[LastCollective]) -> str:
    """`message`, a sentence, which then tells of them too."""
    return f"{message.rstrip('.')}; last collectives: {in_words(last)}." if last else message


def other_ways(last: Sequence[LastCollective], misfits: Sequence[Misfit]) -> list[str]:
    """The names of ranks that were in another collective than most when `misfits` got what did not fit; empty where
    nobody can tell."""
    alike: dict[object, list[str]] = {}
    for misfit in misfits:
        alike.setdefault(misfit.expected_bytes, []).append(misfit.name)
    known = {misfit.name for misfit in misfits}
    for one in last:
        if one.at_failure and (name := f"rank {one.rank} on {one.host}") not in known:
            it = one.collective
            alike.setdefault((it.group, it.number, it.name, it.sizes), []).append(name)
    most = max(alike.values(), key=len)
    others = [name for names in alike.values() if names is not most for name in names]
    return others if len(others) < len(most) else []


def in_ranges(ranks: Iterable[int]) -> str:
    """Such as `ranks 0-6, 8`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{'rank' if listed.isdigit() else 'ranks'} {listed}"
