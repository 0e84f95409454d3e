"""Who is late, by what processes tell of their collectives."""

from __future__ import annotations

import time
from pathlib import Path

from understudy.launch.pulses import Collective, HangWatch, Pulse, late_ranks, read_pulse, write_pulse
from understudy.launch.run_directory import RunDirectory


def pulse(rank: int, number: int, *, done: bool, name: str = "all_reduce", beat: int = 1) -> Pulse:
    return Pulse(rank, "a", 2**22 + rank, beat, 7, 8, (Collective("0", number, name, ((4,),), done),))


def test_a_rank_behind_the_collective_that_others_wait_in_is_late() -> None:
    late = late_ranks([pulse(0, 5, done=False), pulse(1, 4, done=True), pulse(2, 5, done=False)])
    assert list(late) == [1]
    assert "has not entered all_reduce 5" in late[1]


def test_a_rank_in_another_collective_than_most_went_another_way() -> None:
    late = late_ranks([pulse(0, 5, done=False, name="all_gather"), pulse(1, 5, done=False), pulse(2, 5, done=False)])
    assert list(late) == [0]
    assert "it entered all_gather as its collective 5 where the others entered all_reduce" in late[0]


def test_two_ranks_that_differ_do_not_tell_which_is_wrong() -> None:
    assert not late_ranks([pulse(0, 5, done=False, name="all_gather"), pulse(1, 5, done=False)])


def test_nobody_is_late_for_a_collective_that_is_done() -> None:
    assert not late_ranks([pulse(0, 5, done=True), pulse(1, 4, done=True)])


def test_a_pulse_reads_back_as_written(tmp_path: Path) -> None:
    assert read_pulse(tmp_path / "none") is None
    write_pulse(tmp_path / "one", pulse(1, 3, done=True))
    assert read_pulse(tmp_path / "one") == pulse(1, 3, done=True)


def watched(tmp_path: Path, ranks: int) -> tuple[RunDirectory, HangWatch]:
    directory = RunDirectory(tmp_path)
    directory.logs.mkdir()
    for rank in range(ranks):
        write_pulse(directory.pulse(rank), pulse(rank, 5, done=False))
    return directory, HangWatch(directory, 2, 0.05)


def look(watch: HangWatch) -> object:
    watch._look_at = 0.0
    return watch()


def test_ranks_that_do_not_get_on_hang(tmp_path: Path) -> None:
    _, watch = watched(tmp_path, 2)
    assert look(watch) is None
    time.sleep(0.1)
    assert look(watch) is not None


def test_a_run_in_which_any_rank_gets_on_does_not_hang(tmp_path: Path) -> None:
    directory, watch = watched(tmp_path, 2)
    assert look(watch) is None
    time.sleep(0.1)
    write_pulse(directory.pulse(1), pulse(1, 6, done=False))
    assert look(watch) is None


def test_while_a_rank_does_not_train_nothing_is_said(tmp_path: Path) -> None:
    _, watch = watched(tmp_path, 1)
    assert look(watch) is None
    time.sleep(0.1)
    assert look(watch) is None
