"""The loop and its hooks, over a strategy that computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from understudy.contracts import Batch, GlobalBatch, LazyTensor, LossSum, Objective, TensorSpec
from understudy.errors import DivergedError
from understudy.models.decoding import Decoding
from understudy.objectives.causal_lm import CausalLMObjective
from understudy.training.divergence import DivergenceGuard, allowed_non_finite_steps
from understudy.training.generation import Chance, draw_tokens, generate
from understudy.training.hooks import Hook, HookList, StepResult, TrainingState, interval_steps
from understudy.training.loop import train

pytestmark = pytest.mark.unit


class FakeStrategy:
    """Gives the losses and norms it was told to, and notes what it was asked."""

    def __init__(self, norms: Sequence[float] = ()) -> None:
        self.norms = iter(norms)
        self.calls: list[tuple[object, ...]] = []
        self.longest_batch = 0

    def forward_backward(self, micro_batches: Sequence[Batch], objective: Objective, num_tokens: int) -> LossSum:
        self.calls.append(("forward_backward", len(micro_batches), num_tokens))
        return LossSum(torch.tensor(6.0), torch.tensor(num_tokens), {})

    def optimizer_step(self, lr: float, max_norm: float | None) -> Tensor:
        self.calls.append(("optimizer_step", lr, max_norm))
        return torch.tensor(next(self.norms, 1.0))

    def decode(self, texts: Decoding) -> Tensor:
        """The likeliest next token is the last token plus one, modulo 10, with a probability of 0.6; the one behind it
        has most of the rest."""
        self.longest_batch = max(self.longest_batch, texts.seen.numel())
        probabilities = torch.tensor([0.6, 0.35, *[0.05 / 8] * 8])
        return torch.stack([probabilities.roll(int(last) + 1) for last in texts.tokens[:, -1]]).log()

    def build(
        self,
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
    ) -> None: ...
    def load_state(self, read: Callable[[str], LazyTensor]) -> None: ...
    def layout(self) -> Mapping[str, TensorSpec]:
        return {}

    def state(self, owner: Callable[[str], int]) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def evaluate(self, micro_batches: Sequence[Batch], objective: Objective) -> LossSum:
        raise NotImplementedError


class FakeData:
    def step(self, step: int) -> GlobalBatch:
        return GlobalBatch((Batch.of([]),) * 2, num_tokens=3, num_input_tokens=5, examples=(step,), epoch=step + 1)


class Recorder(Hook):
    def __init__(self) -> None:
        self.moments: list[tuple[str, int]] = []

    def start(self, state: TrainingState) -> None:
        self.moments.append(("start", state.step))

    def before_step(self, state: TrainingState) -> None:
        self.moments.append(("before", state.step))

    def after_step(self, result: StepResult) -> None:
        self.moments.append(("after", result.state.step))

    def end(self, state: TrainingState) -> None:
        self.moments.append(("end", state.step))


def run(strategy: FakeStrategy, total_steps: int, *hooks: Hook, state: TrainingState | None = None) -> TrainingState:
    return train(
        state or TrainingState(),
        total_steps=total_steps,
        data=FakeData(),
        strategy=strategy,
        objective=CausalLMObjective(),
        schedule=lambda step: 0.1 * (step + 1),
        max_grad_norm=2.0,
        hooks=HookList(hooks),
    )


def test_each_step_runs_the_whole_global_batch_then_one_optimizer_step_at_its_learning_rate() -> None:
    strategy = FakeStrategy()
    state = run(strategy, 2)
    assert strategy.calls == [
        ("forward_backward", 2, 3),
        ("optimizer_step", 0.1, 2.0),
        ("forward_backward", 2, 3),
        ("optimizer_step", 0.2, 2.0),
    ]
    assert state == TrainingState(step=2, epoch=2, tokens=10)


def test_hooks_see_every_moment_in_order() -> None:
    recorder = Recorder()
    run(FakeStrategy(), 2, recorder)
    assert recorder.moments == [("start", 0), ("before", 0), ("after", 1), ("before", 1), ("after", 2), ("end", 2)]


def test_training_goes_on_from_the_state_it_is_given() -> None:
    recorder = Recorder()
    run(FakeStrategy(), 3, recorder, state=TrainingState(step=2, epoch=2.0, tokens=10))
    assert recorder.moments == [("start", 2), ("before", 2), ("after", 3), ("end", 3)]


def test_more_non_finite_steps_in_a_row_than_allowed_end_the_run_with_status_3() -> None:
    guard = DivergenceGuard(allowed=2, every=1)
    with pytest.raises(DivergedError, match="3 steps in a row, at step 4") as caught:
        run(FakeStrategy([1.0, float("nan"), float("inf"), float("nan"), 1.0]), 5, guard)
    assert caught.value.exit_status == 3


def test_non_finite_steps_that_recover_do_not_end_the_run() -> None:
    guard = DivergenceGuard(allowed=2, every=1)
    bad = float("inf")
    assert run(FakeStrategy([bad, bad, 1.0, bad, bad, 1.0]), 6, guard).step == 6


def test_divergence_between_two_readings_is_not_missed() -> None:
    norms = [float("nan")] * 3 + [1.0] * 4
    with pytest.raises(DivergedError, match="at step 5"):
        run(FakeStrategy(norms), 7, DivergenceGuard(allowed=2, every=5))
    with pytest.raises(DivergedError, match="at step 7"):
        run(FakeStrategy(norms), 7, DivergenceGuard(allowed=2, every=100))


def test_the_search_for_a_loss_scale_is_within_what_fp16_allows() -> None:
    halvings_to_the_smallest_scale = 16 + 14
    assert halvings_to_the_smallest_scale < allowed_non_finite_steps("fp16")
    assert allowed_non_finite_steps("bf16") < 10


def answers(
    strategy: FakeStrategy,
    prompts: list[list[int]],
    room: list[int],
    capacity: int = 100,
    chance: Chance | None = None,
) -> list[list[int]]:
    return generate(
        strategy,
        [torch.tensor(prompt) for prompt in prompts],
        room,
        stops=frozenset({5}),
        micro_batch_tokens=capacity,
        rank=0,
        world_size=1,
        chance=chance,
    )


def test_answers_end_at_a_stop_token_or_when_there_is_no_room() -> None:
    assert answers(FakeStrategy(), [[1, 2], [7], [0]], [10, 2, 0]) == [[3, 4, 5], [8, 9], []]


def test_answers_never_hold_more_than_a_micro_batch_of_tokens() -> None:
    strategy = FakeStrategy()
    assert answers(strategy, [[0] * 4, [1] * 4, [2] * 4], [3, 3, 3], capacity=14) == [[1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert 7 < strategy.longest_batch <= 14


def test_a_sampled_answer_depends_on_its_seed_and_on_nothing_beside_it() -> None:
    prompts, room = [[0], [1, 2], [7], [6]], [30, 4, 20, 7]

    def chance(seed: int, members: Sequence[int] = range(4), top_p: float = 1.0) -> Chance:
        return Chance(1.0, top_p, [(seed, i) for i in members])

    together = answers(FakeStrategy(), prompts, room, chance=chance(3))
    for i in range(4):
        alone = answers(FakeStrategy(), prompts[i : i + 1], room[i : i + 1], chance=chance(3, [i]))
        assert alone == [together[i]]
    assert answers(FakeStrategy(), prompts, room, 8, chance(3)) == together
    assert answers(FakeStrategy(), prompts, room, chance=chance(4)) != together
    likeliest = answers(FakeStrategy(), prompts, room)
    assert answers(FakeStrategy(), prompts, room, chance=chance(3, top_p=0.5)) == likeliest


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0, 1.5]])
    draws = (torch.arange(10_000).double() + 0.5) / 10_000
    for temperature, top_p in ((1.0, 1.0), (2.0, 1.0), (0.5, 0.8)):
        expected = torch.softmax(logits[0].double() / temperature, dim=0)
        order = expected.argsort(descending=True)
        kept = order[: int((expected[order].cumsum(0) < top_p).sum()) + 1]
        mass = torch.zeros(5, dtype=torch.float64).scatter(0, kept, expected[kept])
        drawn = draw_tokens(logits.expand(len(draws), -1), temperature, top_p, draws)
        torch.testing.assert_close(
            drawn.bincount(minlength=5).double() / len(draws), mass / mass.sum(), rtol=0, atol=2e-4
        )


def test_an_evaluation_interval_is_steps_or_a_share_of_the_run() -> None:
    assert interval_steps(None, 200) is None
    assert interval_steps(30, 200) == 30
    assert interval_steps(0.05, 200) == 10
    assert interval_steps(0.001, 200) == 1
