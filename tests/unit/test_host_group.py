"""What the launchers of several hosts tell one another; a dictionary stands for the store that the first one keeps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from understudy.errors import LostHostError, LostProcessError, StoppedError, UnderstudyError, UserError
from understudy.launch import host_group
from understudy.launch.cause import FailedRunError, Misfit, MisfitError, Shortage, ShortOfMemoryError, Standing
from understudy.launch.host_group import Alone, HostGroup
from understudy.launch.last_collectives import LastCollective
from understudy.launch.outcome import first_outcome, told_outcome
from understudy.launch.pulses import Collective

pytestmark = pytest.mark.unit


class FakeStore:
    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.down = False

    def set(self, key: str, value: str) -> None:
        if self.down:
            raise OSError("gone")
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_group, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(host_group, "LOST_WHILE_RUNNING_SECONDS", 0.5)
    monkeypatch.setattr(host_group, "LOST_SECONDS", 0.5)
    monkeypatch.setattr(host_group, "FAREWELL_SECONDS", 0.5)


@contextmanager
def hosts(count: int, store: FakeStore | None = None) -> Iterator[list[HostGroup]]:
    kept = store or FakeStore()
    groups = [HostGroup(kept, node, count, f"name{node}", lambda _: None) for node in range(count)]
    try:
        yield groups
    finally:
        for group in reversed(groups):
            group.close()


def nothing() -> None:
    pass


def test_another_number_of_hosts_is_refused_on_each() -> None:
    store = FakeStore()
    first = HostGroup(store, 0, 3, "a", lambda _: None)
    second = HostGroup(store, 1, 2, "b", lambda _: None)
    try:
        for group in (first, second):
            with pytest.raises(UserError, match=r"^NNODES is \d on host \d \(.\), but \d on host \d \(.\); make it"):
                group.share("x", 1, nothing)
    finally:
        second.close()
        first.close()


def test_two_launchers_with_one_number_are_refused() -> None:
    store = FakeStore()
    with hosts(2, store) as [_, one]:
        other = HostGroup(store, 1, 2, "other", lambda _: None)
        try:
            with pytest.raises(UserError, match=r"^NODE_RANK=1 is told to two launchers, here on .* own\.$"):
                one.share("never said by host 0", 1, nothing)
        finally:
            other.close()


def share_all(groups: list[HostGroup], name: str) -> list[dict[int, object]]:
    """Each says its number; all but the last one say it ahead."""
    for group in groups[:-1]:
        with group._lock:
            group._said[name] = group.node
    return [group.share(name, group.node, nothing) for group in reversed(groups)]


def stop(group: HostGroup) -> None:
    """As when the launcher of a host is killed."""
    group._store = FakeStore()


def until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_hear_what_each_has_said() -> None:
    with hosts(3) as groups:
        assert share_all(groups, "hello") == [{0: 0, 1: 1, 2: 2}] * 3
        assert [group.leads for group in groups] == [True, False, False]


def test_a_host_that_gives_up_ends_the_others_with_its_sentence_and_status() -> None:
    with hosts(2) as (first, second):
        second.give_up(UserError("no such file", file="r.yaml", line=3))
        with pytest.raises(FailedRunError) as caught:
            first.share("prepared", None, nothing)
    assert (str(caught.value), caught.value.exit_status, caught.value.refused) == ("r.yaml:3: no such file", 2, True)


def test_a_failure_that_is_no_wrong_input_says_on_which_host() -> None:
    with hosts(2) as (first, second):
        second.give_up(ValueError("boom"))
        with pytest.raises(FailedRunError, match=r"^host 1 \(name1\): boom$") as caught:
            first.share("prepared", None, nothing)
    assert caught.value.exit_status == 1


def test_a_host_that_was_stopped_stops_the_others() -> None:
    with hosts(2) as (first, second):
        second.give_up(StoppedError("stopped by SIGTERM before training began", begun=False))
        with pytest.raises(StoppedError, match="stopped by SIGTERM") as caught:
            first.share("prepared", None, nothing)
    assert not caught.value.begun


def test_a_host_that_falls_silent_is_lost_by_name() -> None:
    with hosts(3) as groups:
        share_all(groups, "hello")
        stop(groups[2])
        until(lambda: groups[0].trouble(0) is not None)
        problem = groups[0].trouble(0)
    assert isinstance(problem, LostProcessError)
    assert str(problem).startswith("host 2 (name2) no longer answers")


def test_a_host_that_loses_the_first_one_knows_nothing_of_the_others() -> None:
    with hosts(3) as groups:
        share_all(groups, "hello")
        stop(groups[1])
        until(lambda: groups[1].trouble(0) is not None)
        missed = told_outcome(groups[1].lost([2]))
        first = first_outcome({1: missed}, groups[1].lost([0, 2]))
    assert str(first) == "host 0 (name0), where all hosts meet, no longer answers host 1 (name1)."


def test_after_a_failure_the_others_go_on_without_the_hosts_that_are_lost() -> None:
    with hosts(3) as groups:
        share_all(groups, "hello")
        stop(groups[2])
        with groups[1]._lock:
            groups[1]._said["outcome 0"] = None
        assert groups[0].share("outcome 0", None, nothing, tolerant=True) == {0: None, 1: None}
        groups[0].drop([2])
        assert groups[0].members == (0, 1)
        assert groups[0].trouble(1) is None


def test_processes_that_failed_elsewhere_are_trouble_and_those_that_ended_well_are_not() -> None:
    with hosts(2) as (first, second):
        share_all([first, second], "hello")
        with second._lock:
            second._said["outcome 0"] = None
            second._said["outcome 1"] = told_outcome(LostProcessError("rank 3 was killed"))
        until(lambda: "outcome 1" in first._heard.get(1, {}))
        assert first.trouble(0) is None
        problem = first.trouble(1)
    assert isinstance(problem, FailedRunError)
    assert problem.standing == Standing.HEARD


def test_a_host_whose_meeting_place_is_gone_says_so() -> None:
    store = FakeStore()
    with hosts(2, store) as (_, second):
        store.down = True
        until(lambda: second.trouble(0) is not None)
        assert "where all hosts meet, no longer answers" in str(second.trouble(0))


def test_a_host_that_never_comes_is_told_from_one_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_group, "MEETING_SECONDS", 0.2)
    group = HostGroup(FakeStore(), 0, 2, "a", lambda _: None)
    with pytest.raises(LostProcessError, match="host 1 did not come within"):
        group.share("hello", 0, nothing)
    group.close()


def test_one_host_alone_has_nobody_to_hear() -> None:
    alone = Alone()
    assert alone.share("hello", 7, nothing) == {0: 7}
    assert alone.trouble(0) is None


# Which of several ends was first

OUT_OF_MEMORY = ShortOfMemoryError("out", Shortage(3, "a", 5, True, 100, "ran out of memory", Path("log")))
SECONDARY = FailedRunError("connection closed", 5, standing=Standing.PEER_FAILED)
ABORTED = FailedRunError("aborted", 5, standing=Standing.ABORTED)
HEARD = FailedRunError("processes of another host failed", 5, standing=Standing.HEARD)
STOPPED = StoppedError("stopped by SIGTERM after step 5")
KILLED = LostProcessError("rank 3 was killed by SIGKILL")


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([None, None], None),
        ([SECONDARY, KILLED], KILLED),
        ([SECONDARY, None], LostProcessError("connection closed")),
        ([STOPPED, STOPPED], STOPPED),
        ([STOPPED, KILLED], KILLED),
        ([SECONDARY, OUT_OF_MEMORY], OUT_OF_MEMORY),
        ([FailedRunError("not finite", 3), SECONDARY], FailedRunError("not finite", 3)),
        ([SECONDARY, ABORTED], LostProcessError("aborted")),
        ([HEARD, SECONDARY], LostProcessError("connection closed")),
    ],
)
def test_the_first_failure_is_the_one_that_follows_from_no_other(
    ends: list[UnderstudyError | None], expected: UnderstudyError | None
) -> None:
    first = first_outcome({node: told_outcome(end) for node, end in enumerate(ends)}, None)
    assert type(first) is type(expected)
    if expected is not None:
        assert first is not None
        assert (str(first), first.exit_status) == (str(expected), expected.exit_status)
    if isinstance(expected, ShortOfMemoryError):
        assert isinstance(first, ShortOfMemoryError)
        assert first.shortage == expected.shortage


def last(rank: int, number: int, name: str = "all_reduce", *, done: bool = False, size: int = 4) -> LastCollective:
    return LastCollective(rank, "a", Collective("0", number, name, ((size,),), done), not done)


def test_a_failure_tells_the_last_collective_of_each_rank_and_wrong_input_does_not() -> None:
    here = [last(rank, 17) for rank in range(7)]
    there = [last(7, 16, "all_gather", done=True), *(last(rank, 17) for rank in range(8, 64))]
    first = first_outcome({0: told_outcome(SECONDARY, here), 1: told_outcome(KILLED, there)}, None)
    told = "all_reduce 17 not done: ranks 0-6, 8-63; by last pulses, all_gather 16 done: rank 7"
    assert str(first) == f"rank 3 was killed by SIGKILL; last collectives: {told}."
    short = first_outcome({0: told_outcome(OUT_OF_MEMORY, here)}, None)
    assert isinstance(short, ShortOfMemoryError)
    assert short.shortage.last_collectives == "all_reduce 17 not done: ranks 0-6"
    wrong = told_outcome(FailedRunError("r.yaml:3: no", 2), here)
    assert str(first_outcome({0: wrong}, None)) == "r.yaml:3: no"


def test_the_last_collectives_of_a_lost_hosts_ranks_are_told_too() -> None:
    lost = LostHostError("host 1 (b) no longer answers.")
    first = first_outcome({0: told_outcome(SECONDARY, [last(0, 3)])}, lost, [last(1, 2, done=True)])
    assert isinstance(first, LostHostError)
    told = "all_reduce 3 not done: rank 0; by last pulses, all_reduce 2 done: rank 1"
    assert str(first) == f"host 1 (b) no longer answers; last collectives: {told}."


def misfit(rank: int, got_bytes: int, expected_bytes: int) -> FailedRunError:
    return MisfitError([Misfit(f"rank {rank} on a", got_bytes, expected_bytes, "log")])


def test_the_rank_in_another_collective_than_most_went_another_way() -> None:
    """Whichever it is of the rank that gloo ends because it got too much, or the one that sent it."""
    told = {0: told_outcome(misfit(1, 64, 4), [last(0, 5), last(2, 5)])}
    first = first_outcome(told, None)
    assert str(first).startswith("rank 1 on a skipped a collective, or entered another one than the others: rank 1 on ")
    assert first is not None
    assert first.exit_status == 1

    told = {node: told_outcome(misfit(node, 64, 4), [last(2, 5, size=16)] if node else []) for node in range(2)}
    assert str(first_outcome(told, None)).startswith("rank 2 on a skipped a collective")

    told = {0: told_outcome(misfit(1, 64, 4), [last(0, 5)])}
    assert str(first_outcome(told, None)).startswith("a rank skipped a collective")


def test_a_lost_host_explains_failures_that_follow_but_not_ones_of_their_own() -> None:
    lost = LostHostError("host 1 no longer answers")
    assert str(first_outcome({0: told_outcome(SECONDARY)}, lost)) == str(lost)
    assert str(first_outcome({0: told_outcome(KILLED)}, lost)) == str(KILLED)
    assert first_outcome({0: None}, lost) is lost
