"""Which ranks are said to be slow, by when each enters its collectives."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from understudy.launch.pulses import TRAINING, Pulse, write_pulse
from understudy.launch.run_directory import RunDirectory
from understudy.launch.stragglers import StragglerWatch

RANKS = 3
REMEMBERED = 128
Late = Callable[[int, int], float]
"""Seconds that a rank computes longer than the others, before the collective of that number of a step."""


def said_of(
    path: Path,
    late: Late,
    *,
    collectives: int,
    hosts: str = "aaa",
    clocks: tuple[float, ...] = (0.0, 0.0, 0.0),
    minutes: float = 1.0,
) -> list[str]:
    """What is said of a run whose steps have so many collectives, each 0.3 s / `collectives` after the one before.
    All wait in each for the last, and each tells once a second of the last ones by its clock."""
    directory, said, now = RunDirectory(path), [], 1000.0
    directory.logs.mkdir()
    watch = StragglerWatch(directory, RANKS, said.append, lambda: now)
    entered: list[list[tuple[int, int]]] = [[] for _ in range(RANKS)]
    number, step, tell_at, end, took, drawn = 0, 0, now, now + 60 * minutes, 0.0, random.Random(3)
    while now < end:
        began = now
        for place in range(collectives):
            number += 1
            times = [now + 0.3 / collectives + late(rank, place) for rank in range(RANKS)]
            for rank, at in enumerate(times):
                entered[rank].append((number, round((at + clocks[rank]) * 1e6)))
            now = max(times)
            if step and now >= tell_at:
                tell_at = now + 0.75 + drawn.random() / 2
                for rank in range(RANKS):
                    last = {"gloo:0": entered[rank][-REMEMBERED:]}
                    beat = Pulse(rank, hosts[rank], 1, number, TRAINING, step, step, (), now + clocks[rank], took, last)
                    write_pulse(directory.pulse(rank), beat)
                watch()
        step, took = step + 1, now - began
    assert directory.slow_ranks.exists() == bool(said)
    return said


@pytest.mark.parametrize("collectives", [1, 6, 120])
def test_a_rank_that_is_late_in_one_collective_of_each_step_is_named_once_with_the_step_s_time(
    collectives: int, tmp_path: Path
) -> None:
    """However many collectives a step has, and though not all of them are told of."""
    said = said_of(tmp_path, lambda rank, place: 0.3 * (rank == 1 and place == 0), collectives=collectives)
    assert len(said) == 1
    assert said[0].startswith("rank 1 on a is slow: the others wait 0.")
    assert said[0].endswith("in each step of 0.60 s")
    if collectives <= 6:
        assert float(said[0].split()[9]) == pytest.approx(0.3, abs=0.03)


def test_a_rank_that_is_a_little_late_in_all_collectives_is_named(tmp_path: Path) -> None:
    said = said_of(tmp_path, lambda rank, place: 0.01 * (rank == 2), collectives=20)
    assert [line[:9] for line in said] == ["rank 2 on"]
    assert "wait 0.20 s for it in each step of 0.50 s" in said[0]


def test_ranks_that_are_late_by_turns_are_not_named(tmp_path: Path) -> None:
    drawn = random.Random(7)
    assert not said_of(tmp_path, lambda rank, place: drawn.expovariate(1 / 0.05), collectives=3, minutes=5)


def test_a_rank_that_was_slow_for_a_while_is_not_named(tmp_path: Path) -> None:
    steps = [0]

    def late(rank: int, place: int) -> float:
        steps[0] += rank == 0
        return 0.3 * (rank == 1 and steps[0] < 12)

    assert not said_of(tmp_path, late, collectives=1)


def test_what_others_wait_for_a_small_part_of_the_step_is_not_said(tmp_path: Path) -> None:
    assert not said_of(tmp_path, lambda rank, place: 0.05 * (rank == 0), collectives=1)


def test_a_host_whose_clock_goes_ahead_is_not_slow_and_a_slow_one_is_named_all_the_same(tmp_path: Path) -> None:
    for name in "even", "slow":
        (tmp_path / name).mkdir()
    ahead = {"hosts": "aab", "clocks": (0.0, 0.0, 0.2)}
    assert not said_of(tmp_path / "even", lambda rank, place: 0.0, collectives=4, **ahead)  # type: ignore[arg-type]
    said = said_of(
        tmp_path / "slow",
        lambda rank, place: 0.3 * (rank == 2 and place == 0),
        collectives=4,
        **ahead,  # type: ignore[arg-type]
    )
    assert "rank 2 on b is slow: the others wait 0.30 s for it in each step of 0.60 s" in said[0]
