"""The training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from understudy.contracts import GlobalBatch, Objective, Strategy
from understudy.errors import LostTeacherError, StoppedWaitingError
from understudy.training.hooks import Hook, StepResult, TrainingState

__all__ = ["Data", "train"]


class Data(Protocol):
    def step(self, step: int) -> GlobalBatch:
        """The global batch of step `step`, from 0."""
        ...


def train(
    state: TrainingState,
    *,
    total_steps: int,
    data: Data,
    strategy: Strategy,
    objective: Objective,
    schedule: Callable[[int], float],
    max_grad_norm: float | None,
    hooks: Hook,
) -> TrainingState:
    """Trains from `state` until `total_steps` steps are done. Every rank must call it with the same arguments, apart
    from the micro-batches that `data` gives it."""
    try:
        hooks.start(state)
        while state.step < total_steps:
            hooks.before_step(state)
            batch = data.step(state.step)
            learning_rate = schedule(state.step)
            loss = strategy.forward_backward(batch.micro_batches, objective, batch.num_tokens)
            norm = strategy.optimizer_step(learning_rate, max_grad_norm)
            state = state.advance(batch)
            hooks.after_step(StepResult(state, batch, loss, norm, learning_rate))
        hooks.end(state)
    except (LostTeacherError, StoppedWaitingError) as error:
        hooks.interrupted(state, error)
        raise
    return state
