"""Evaluation while training: loss over the evaluation set, and greedy answers to some of its prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from torch import Tensor

from understudy.contracts import Batch, Objective, Strategy
from understudy.data.batching import evaluation_batches, prompt_and_answer
from understudy.data.cache import TokenCache
from understudy.parallel.world import World
from understudy.training.asking import Asking
from understudy.training.companions import special_ids
from understudy.training.generation import generate
from understudy.training.hooks import Hook, StepResult, TrainingState
from understudy.training.metrics import evaluation_metrics
from understudy.training.sinks.registry import Answer, Row, Sink

__all__ = ["EvaluationHook", "Evaluator", "asked"]

SLACK_TOKENS = 8
"""An answer may grow this much longer than its reference: enough to see that it does."""
MOST_ANSWER_TOKENS = 256
"""Longest answer to generate. A longer reference is never matched."""


@dataclass(frozen=True)
class Evaluator:
    """What one evaluation takes. Its methods are collectives: every rank calls them."""

    cache: TokenCache
    strategy: Strategy
    objective: Objective
    tokenizer: Any
    """A transformers tokenizer."""
    stops: frozenset[int]
    """Tokens that end an answer."""
    world: World
    micro_batch_tokens: int
    max_length: int
    max_batches: int | None
    samples: int
    asking: Asking | None = None
    """Of a teacher that is asked before it is needed."""
    given: Callable[[Sequence[Batch]], None] = lambda _: None
    """Told of the micro-batches before they are evaluated."""
    mark: Callable[[], None] = lambda: None
    """Called for each token that is generated."""

    def metrics(self) -> Row:
        """Loss, perplexity and token accuracy over the evaluation set."""
        batches = self._micro_batches() if self.asking is None else self._answered
        self.given(batches)
        return evaluation_metrics(self.strategy.evaluate(batches, self.objective))

    def _micro_batches(self) -> tuple[Batch, ...]:
        return evaluation_batches(
            self.cache,
            micro_batch_tokens=self.micro_batch_tokens,
            rank=self.world.rank,
            world_size=self.world.size,
            max_batches=self.max_batches,
        )

    @cached_property
    def _answered(self) -> tuple[Batch, ...]:
        """They are the same each time, and so is what a teacher says of them."""
        assert self.asking is not None, "else there is nothing to be said"
        return self.asking.answered(self._micro_batches())

    def answers(self) -> list[Answer]:
        """Greedy answers to the first `samples` prompts of the evaluation set, the same on every rank. Text is decoded
        without special tokens and stripped."""
        count = min(self.samples, len(self.cache.lengths))
        pairs = [prompt_and_answer(self.cache, i) for i in range(count)]
        said = generate(
            self.strategy,
            [prompt for prompt, _ in pairs],
            [self._room(prompt, answer) for prompt, answer in pairs],
            stops=self.stops,
            micro_batch_tokens=self.micro_batch_tokens,
            rank=self.world.rank,
            world_size=self.world.size,
            mark=self.mark,
        )
        return [
            Answer(asked(self.tokenizer, prompt.tolist()), self._text(tokens), self._text(answer))
            for (prompt, answer), tokens in zip(pairs, said)
        ]

    def _room(self, prompt: Tensor, answer: Tensor) -> int:
        return min(len(answer) + SLACK_TOKENS, MOST_ANSWER_TOKENS, self.max_length - len(prompt))

    def _text(self, tokens: Tensor | list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def asked(tokenizer: Any, prompt: Sequence[int]) -> str:
    """What a prompt asks, to be shown: its last part between special tokens, without the header of the answer and the
    word `user` that many chat templates put around it. Without special tokens, all of it."""
    special = special_ids(tokenizer)
    groups = [list(group) for is_special, group in groupby(prompt, special.__contains__) if not is_special]
    parts = [text for group in groups if (text := str(tokenizer.decode(group)).strip())]
    if len(parts) > 1:
        parts.pop()
    return parts[-1].removeprefix("user\n").strip() if parts else ""


class EvaluationHook(Hook):
    """Evaluates every `every` steps (not at all when None) and after the last; before the first too, when prompts are
    answered, so that before and after can be compared. Rows and answers go to the sinks, which rank 0 has."""

    def __init__(self, evaluator: Evaluator, every: int | None, sinks: Sequence[Sink]) -> None:
        self._evaluator = evaluator
        self._every = every
        self._sinks = sinks
        self._evaluated_step = -1
        self.last: Row = {}
        """The last row."""

    def start(self, state: TrainingState) -> None:
        if self._evaluator.samples and state.step == 0:
            self._evaluate(state)

    def after_step(self, result: StepResult) -> None:
        if self._every is not None and result.state.step % self._every == 0:
            self._evaluate(result.state)

    def end(self, state: TrainingState) -> None:
        self.evaluate_once(state)

    def evaluate_once(self, state: TrainingState) -> None:
        """Evaluates, unless that was done at this step; a collective."""
        if self._evaluated_step != state.step:
            self._evaluate(state)

    def loss_at(self, step: int) -> float | None:
        """In nats a supervised token; None where that step was not evaluated."""
        return self.last["eval_loss"] if self._evaluated_step == step else None

    def _evaluate(self, state: TrainingState) -> None:
        row = {"step": state.step, "epoch": state.epoch, **self._evaluator.metrics()}
        answers = self._evaluator.answers() if self._evaluator.samples else []
        if answers:
            row["eval_exact_match"] = sum(answer.correct for answer in answers) / len(answers)
        for sink in self._sinks:
            sink.row(row)
            sink.answers(state.step, answers)
        self.last = row
        self._evaluated_step = state.step
