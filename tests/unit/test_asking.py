"""What a step needs from far away is asked for a step ahead, and ranks agree on what came of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from understudy.contracts import Batch, GlobalBatch
from understudy.errors import LostTeacherError, StoppedError, StoppedWaitingError
from understudy.objectives.targets import SeveralTargets, TopKTargets
from understudy.objectives.teachers.server_client import LostServerError
from understudy.objectives.teachers.several_teachers import SeveralTeachers
from understudy.objectives.teachers.teacher import Teaching
from understudy.training import asking
from understudy.training.asking import AskedData, Asking, make_asking
from understudy.training.checkpointing import CheckpointHook
from understudy.training.hooks import Hook, TrainingState
from understudy.training.loop import train
from understudy.training.stopping import StopHook, StopRequest

pytestmark = pytest.mark.unit

Ask = Callable[[Sequence[Batch]], Sequence[Any]]


class Peers:
    """Ranks 1 and 2 of three, as rank 0 meets them: each exchange takes what the next of `states` says of them."""

    def __init__(self) -> None:
        self.states: list[tuple[int, int, int]] = []
        self.said = ""
        self.exchanges = 0

    def all_reduce(self, states: Tensor, op: object) -> None:
        self.exchanges += 1
        told = self.states.pop(0) if self.states else (0, 0, 0)
        states.copy_(torch.maximum(states, torch.tensor(told)))

    def broadcast_object_list(self, said: list[Any], src: int, device: torch.device) -> None:
        if src != 0:
            said[0] = f"{self.said} (said by {src})"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Peers:
    peers = Peers()
    monkeypatch.setattr(asking.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(asking.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(asking.dist, "all_reduce", peers.all_reduce)
    monkeypatch.setattr(asking.dist, "broadcast_object_list", peers.broadcast_object_list)
    monkeypatch.setattr(asking, "LOOK_UP_SECONDS", 0.05)
    return peers


@dataclass
class Steps:
    """Each batch is the number of its step."""

    unknown: tuple[int, ...] = ()

    def step(self, step: int) -> GlobalBatch:
        batch = Batch.of([(torch.tensor([step, step]), torch.tensor([step, -100]))])
        return GlobalBatch((batch,), num_tokens=1, num_input_tokens=2, examples=(step,), epoch=step + 1.0)

    def known(self, step: int) -> bool:
        return step not in self.unknown


class Noting:
    """Answers with the batch's number plus 100, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.answered = threading.Semaphore(0)

    def __call__(self, batches: Sequence[Batch]) -> list[int]:
        numbers = [int(batch.tokens[0]) for batch in batches]
        self.asked += numbers
        self.answered.release()
        return [number + 100 for number in numbers]


@pytest.fixture
def never() -> Iterator[Ask]:
    """Does not answer while the test runs."""
    over = threading.Event()

    def ask(batches: Sequence[Batch]) -> list[Any]:
        over.wait()
        return [None]

    yield ask
    over.set()


def failing(batches: Sequence[Batch]) -> list[Any]:
    raise LostServerError("http://a/v1 is gone")


def test_the_next_step_is_asked_about_while_this_one_computes(peers: Peers) -> None:
    ask = Noting()
    data = AskedData(Steps(), Asking(ask, StopRequest()), total_steps=3)
    for step in range(3):
        batch = data.step(step)
        assert [each.targets for each in batch.micro_batches] == [step + 100]
        assert (batch.examples, batch.epoch) == ((step,), step + 1.0)
        for _ in range(2 if step == 0 else int(step < 2)):
            assert ask.answered.acquire(timeout=5)
        assert ask.asked == list(range(min(step + 2, 3))), "one step ahead, and none past the end"


def test_a_step_that_depends_on_the_one_before_is_asked_about_when_it_comes(peers: Peers) -> None:
    ask = Noting()
    data = AskedData(Steps(unknown=(1,)), Asking(ask, StopRequest()), total_steps=3)
    assert data.step(0).micro_batches[0].targets == 100
    assert ask.asked == [0]
    assert data.step(1).micro_batches[0].targets == 101
    assert data.step(2).micro_batches[0].targets == 102


def test_a_failure_of_this_rank_is_told_to_all_and_raised(peers: Peers) -> None:
    with pytest.raises(LostTeacherError, match=r"^the teacher cannot be asked: http://a/v1 is gone$") as caught:
        Asking(failing, StopRequest()).answered(Steps().step(0).micro_batches)
    assert caught.value.exit_status == 5


def test_a_failure_of_another_rank_is_raised_though_this_one_has_its_answer(peers: Peers) -> None:
    peers.states, peers.said = [(1, 0, 0), (0, 1, 0)], "http://b/v1 is gone"
    with pytest.raises(LostTeacherError, match=r"http://b/v1 is gone \(said by 2\)"):
        Asking(Noting(), StopRequest()).answered(Steps().step(0).micro_batches)


def test_of_several_failures_that_of_the_first_rank_is_told(peers: Peers) -> None:
    peers.states, peers.said = [(0, 2, 0)], "http://b/v1 is gone"
    with pytest.raises(LostTeacherError, match=r"asked: http://a/v1 is gone"):
        Asking(failing, StopRequest()).answered(Steps().step(0).micro_batches)


def test_ranks_wait_until_the_last_has_its_answer(peers: Peers) -> None:
    peers.states = [(1, 0, 0), (1, 0, 0), (0, 0, 0)]
    (batch,) = Asking(Noting(), StopRequest()).answered(Steps().step(4).micro_batches)
    assert (batch.targets, peers.exchanges) == (104, 3)


def test_a_request_to_stop_ends_the_wait_of_all(peers: Peers, never: Ask) -> None:
    peers.states = [(0, 0, 0), (0, 0, signal.SIGTERM)]
    with pytest.raises(StoppedWaitingError, match="stopped by SIGTERM"):
        Asking(never, StopRequest()).answered(Steps().step(0).micro_batches)


def test_a_request_to_stop_lets_a_step_begin_that_needs_not_wait(peers: Peers) -> None:
    peers.states = [(0, 0, signal.SIGTERM)]
    (batch,) = Asking(Noting(), StopRequest()).answered(Steps().step(0).micro_batches)
    assert batch.targets == 100


def test_a_mistake_of_ours_is_no_lost_teacher(peers: Peers) -> None:
    with pytest.raises(ZeroDivisionError):
        Asking(lambda batches: [1 // 0], StopRequest()).answered(Steps().step(0).micro_batches)


class Interrupted(Hook):
    """Notes the states at which it was."""

    def __init__(self) -> None:
        self.at: list[TrainingState] = []

    def interrupted(self, state: TrainingState, error: LostTeacherError | StoppedWaitingError) -> None:
        self.at.append(state)


class AtTheStart(Interrupted):
    """As an evaluation that asks."""

    def start(self, state: TrainingState) -> None:
        raise LostTeacherError("gone")


def run(data: AskedData, hook: Hook, state: TrainingState) -> None:
    train(
        state,
        total_steps=3,
        data=data,
        strategy=None,  # type: ignore[arg-type]  # no step comes to be computed
        objective=None,  # type: ignore[arg-type]
        schedule=lambda step: 0.0,
        max_grad_norm=None,
        hooks=hook,
    )


def test_hooks_are_told_of_an_interruption_with_what_is_done(peers: Peers) -> None:
    state = TrainingState(step=2, epoch=0.5, tokens=7)
    for hook in (Interrupted(), AtTheStart()):
        with pytest.raises(LostTeacherError):
            run(AskedData(Steps(), Asking(failing, StopRequest()), total_steps=3), hook, state)
        assert hook.at == [state]


def test_without_checkpoints_a_stop_while_waiting_says_after_which_step(peers: Peers, never: Ask) -> None:
    peers.states = [(0, 0, signal.SIGINT)]
    data, hook = AskedData(Steps(), Asking(never, StopRequest()), total_steps=3), StopHook(StopRequest())
    hook.before_step = lambda state: None  # type: ignore[method-assign]  # a collective
    with pytest.raises(StoppedError, match=r"^stopped by SIGINT after step 2\.$"):
        run(data, hook, TrainingState(step=2))


class Saver:
    """Notes the steps of checkpoints that were begun, and those that are committed."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.committed: list[int] = []

    def save(self, step: int) -> None:
        self.begun.append(step)

    def wait(self) -> None:
        self.committed = list(self.begun)

    def check(self) -> list[Path]:
        return []


@pytest.mark.parametrize(
    ("begun_at", "interrupted_at", "saved", "kept"),
    [
        (0, 3, [3], "the checkpoint of step 3 is checkpoints/3"),
        (3, 3, [], "the checkpoint of step 3 is checkpoints/3"),
        (0, 0, [], "no step is done"),
    ],
)
def test_what_is_done_is_saved_once_before_an_interrupted_run_ends(
    begun_at: int, interrupted_at: int, saved: list[int], kept: str
) -> None:
    saver = Saver()
    hook = CheckpointHook(
        saver,  # type: ignore[arg-type]
        every=None,
        total_steps=9,
        progress=lambda state, loss: state.step,  # type: ignore[arg-type,return-value]
        stop=StopRequest(),
        evaluation=None,
        evaluate_first=False,
        location=lambda step: Path(f"checkpoints/{step}"),
        say=lambda line: None,
    )
    hook.start(TrainingState(step=begun_at))
    state = TrainingState(step=interrupted_at)
    with pytest.raises(LostTeacherError) as lost:
        hook.interrupted(state, LostTeacherError("the teacher is gone"))
    assert str(lost.value) == f"the teacher is gone; {kept}. Put that right, then run the same command again to go on."
    with pytest.raises(StoppedError) as stopped:
        hook.interrupted(state, StoppedWaitingError("stopped by SIGTERM"))
    assert str(stopped.value) == f"stopped by SIGTERM; {kept}. Run the same command again to go on."
    assert saver.committed == saved


class Known:
    """A teacher in this process."""

    def targets(self, batch: Batch) -> Any:
        assert batch.targets is None
        return TopKTargets(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), torch.zeros(1))


class Far:
    def targets(self, batch: Batch) -> Any:
        return TopKTargets(torch.full((1, 1), batch.targets), torch.zeros(1, 1), torch.zeros(1))


def test_of_several_teachers_those_far_away_are_asked_ahead(peers: Peers) -> None:
    here, far = Teaching(Known(), 7), Teaching(Far(), 8, Noting())
    several = SeveralTeachers(((0.25, here), (0.75, far)))
    (batch,) = Asking(several.ask, StopRequest()).answered(Steps().step(3).micro_batches)
    targets = several.targets(batch)
    assert isinstance(targets, SeveralTargets)
    ids = [each.targets.part(slice(0, 1)).ids.tolist() for each in targets.members]  # type: ignore[union-attr]
    assert ids == [[[0]], [[103]]]


def test_nobody_is_asked_ahead_who_is_here() -> None:
    assert make_asking(None, StopRequest()) is None
    assert make_asking(Teaching(Known(), 7), StopRequest()) is None
