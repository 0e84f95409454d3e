"""When a run is said to hang and who is late, by what processes tell of themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from understudy.launch import hangs
from understudy.launch.cause import HangError
from understudy.launch.hangs import HangWatch, late_ranks
from understudy.launch.last_collectives import last_collectives
from understudy.launch.outcome import first_outcome, told_outcome
from understudy.launch.pulses import (
    LOADING,
    MEETING,
    PROVING,
    SAVING,
    STARTING,
    TRAINING,
    Collective,
    Pulse,
    write_pulse,
)
from understudy.launch.run_directory import RunDirectory

NOBODY = 2**22
"""No process has such a number."""


def pulse(rank: int, number: int, *, done: bool, name: str = "all_reduce", host: str = "a") -> Pulse:
    entered = Collective("gloo:0", number, name, ((4,),), done)
    return Pulse(rank, host, NOBODY + rank, 1, TRAINING, 7, 8, (entered,))


def test_a_rank_behind_the_collective_that_others_wait_in_is_late() -> None:
    late = late_ranks([pulse(0, 5, done=False), pulse(1, 4, done=True), pulse(2, 5, done=False)])
    assert list(late) == [1]
    assert "has not entered all_reduce 5" in late[1]


def test_a_rank_that_has_entered_no_collective_is_late_for_that_of_all() -> None:
    late = late_ranks([pulse(0, 1, done=False), replace(pulse(1, 1, done=False), collectives=())])
    assert late == {1: "has not entered all_reduce 1, which rank 0 waits in"}


def test_a_rank_in_another_collective_than_most_went_another_way() -> None:
    late = late_ranks([pulse(0, 5, done=False, name="all_gather"), pulse(1, 5, done=False), pulse(2, 5, done=False)])
    assert list(late) == [0]
    assert "it entered all_gather as its collective 5 where the others entered all_reduce" in late[0]


def test_two_ranks_that_differ_do_not_tell_which_is_wrong() -> None:
    assert not late_ranks([pulse(0, 5, done=False, name="all_gather"), pulse(1, 5, done=False)])


def test_nobody_is_late_for_a_collective_that_is_done() -> None:
    assert not late_ranks([pulse(0, 5, done=True), pulse(1, 4, done=True)])


def test_without_collectives_a_rank_that_has_not_got_as_far_as_others_is_late() -> None:
    early = [replace(pulse(rank, 1, done=True), collectives=(), phase=MEETING, step=None) for rank in range(3)]
    early[1] = replace(early[1], phase=STARTING)
    assert late_ranks(early) == {1: "has not got to meeting the others, as ranks 0, 2 have"}


class Run:
    """A run of two ranks whose watch is asked twice a second, by a clock of its own; hangs come after 10 s."""

    def __init__(self, path: Path) -> None:
        self.directory = RunDirectory(path)
        self.directory.logs.mkdir()
        self.now = 0.0
        self.watch = HangWatch(self.directory, 2, 10.0, lambda: self.now)

    def tell(self, rank: int, **changes: Any) -> None:
        write_pulse(self.directory.pulse(rank), replace(pulse(rank, 5, done=False), **changes))

    def beat(self, rank: int, seconds: float, **changes: Any) -> HangError | None:
        """Has `rank` tell the same again and again, for so long."""
        found = None
        for second in range(round(seconds)):
            self.tell(rank, beat=round(self.now) + second + 10, **changes)
            found = found or self.look(1.0)
        return found

    def look(self, seconds: float) -> HangError | None:
        for _ in range(round(seconds * 2)):
            self.now += 0.5
            if (found := self.watch()) is not None:
                return found
        return None


@pytest.fixture(autouse=True)
def on_host_a(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangs, "host_name", lambda: "a")
    monkeypatch.setattr(hangs, "STACK_SECONDS", 0.0)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_ranks_that_do_not_get_on_hang_and_one_without_a_beat_is_named(run: Run) -> None:
    run.tell(1)
    run.tell(0)
    assert run.beat(0, 9.0) is None
    found = run.beat(0, 3.0)
    assert found is not None
    assert str(found).startswith("no rank got on for 10 s: rank 1 on a after step 7 cannot run Python")
    assert "rank 0 on" not in str(found)


def test_a_hang_tells_each_rank_once_by_the_pulses_it_was_found_by(run: Run) -> None:
    """A rank that stands was some fast steps further than its last pulse; to leave its stacks it goes on from there."""
    run.tell(1)
    run.tell(0)
    assert run.look(0.5) is None
    ahead = (replace(pulse(0, 90, done=False).collectives[0]),)
    found = run.beat(0, 12.0, step=48, collectives=ahead)
    run.tell(1, step=48, collectives=ahead)
    told = told_outcome(found, last_collectives(run.directory, range(2)))
    stacks = run.directory.stacks(1)
    assert str(first_outcome({0: told}, None)) == (
        "no rank got on for 10 s: rank 1 on a after step 48 cannot run Python: something holds the interpreter's lock, "
        f"or its disk does not answer (stacks in {stacks}); last collectives: all_reduce 90 not done: rank 0; "
        "by last pulses, all_reduce 5 not done: rank 1."
    )


@pytest.mark.parametrize("mark", [{"marks": 9}, {"step": 8}, {"collectives": ()}, {"phase": SAVING}])
def test_a_run_in_which_any_rank_gets_on_does_not_hang(mark: dict[str, Any], run: Run) -> None:
    run.tell(0)
    run.tell(1)
    assert run.look(9.0) is None
    run.tell(1, **mark)
    assert run.look(9.0) is None


def test_while_ranks_of_this_host_do_not_get_on_those_of_others_count(run: Run) -> None:
    run.tell(0)
    run.tell(1, host="b")
    assert run.look(8.0) is None
    run.tell(1, host="b", marks=9)
    assert run.look(9.0) is None
    assert run.look(5.0) is not None


def test_the_host_of_a_late_rank_speaks_first(run: Run) -> None:
    """It has the stacks written, and another host's launcher would end the run before."""
    ahead, behind = {"host": "a"}, {"host": "b", "collectives": ()}
    run.tell(0, **ahead)
    run.tell(1, **behind)
    for second in range(12):
        run.tell(0, beat=second + 2, **ahead)
        run.tell(1, beat=second + 2, **behind)
        assert run.look(1.0) is None
    assert "rank 1 on b after step 7 has not entered all_reduce 5" in str(run.look(2.0))


def test_a_process_that_does_not_come_is_named_after_three_minutes(run: Run) -> None:
    run.tell(0, phase=MEETING, step=None, collectives=())
    assert run.beat(0, 179.0, phase=MEETING, step=None, collectives=()) is None
    found = run.beat(0, 3.0, phase=MEETING, step=None, collectives=())
    assert "rank 1 has not come" in str(found)


def test_a_rank_that_stands_before_the_first_step_is_named(run: Run) -> None:
    run.tell(1, phase=LOADING, step=None)
    found = run.beat(0, 12.0, phase=LOADING, step=None)
    assert "rank 1 on a while loading the model cannot run Python" in str(found)


def test_ranks_that_have_ended_do_not_hang(run: Run) -> None:
    for rank in (0, 1):
        run.tell(rank, phase=SAVING)
    assert run.look(1.0) is None
    run.directory.pulse(1).unlink()
    assert run.look(9.0) is None
    run.directory.pulse(0).unlink()
    assert run.look(100.0) is None


def test_a_rank_that_does_not_end_where_others_have_is_named(run: Run) -> None:
    for rank in (0, 1):
        run.tell(rank, phase=SAVING)
    assert run.look(1.0) is None
    run.directory.pulse(1).unlink()
    assert "rank 0 on a after step 7" in str(run.look(12.0))


def test_the_first_rank_is_watched_while_it_proves_the_model_alone(run: Run) -> None:
    run.tell(0, phase=PROVING)
    found = run.look(12.0)
    assert str(found).startswith("no rank got on for 10 s: rank 0 on a after step 7 cannot run Python")


def test_time_in_which_the_watcher_was_stopped_does_not_count(run: Run) -> None:
    run.tell(0)
    run.tell(1)
    assert run.look(2.0) is None
    run.now += 3600
    assert run.look(2.0) is None
