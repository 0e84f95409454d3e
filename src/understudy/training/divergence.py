"""Ends a run whose loss or gradient stays non-finite."""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.errors import DivergedError
from understudy.training.hooks import Hook, StepResult, TrainingState

__all__ = ["DivergenceGuard", "allowed_non_finite_steps"]

ALLOWED_STEPS = 5
ALLOWED_STEPS_FP16 = 40
"""Dynamic loss scaling finds its scale by overflowing: a search from 2^16 down to 2^-14, with room to spare."""


def allowed_non_finite_steps(precision: str) -> int:
    """Steps in a row that may have a non-finite loss or gradient."""
    return ALLOWED_STEPS_FP16 if precision == "fp16" else ALLOWED_STEPS


class DivergenceGuard(Hook):
    """Raises `DivergedError` after more than `allowed` non-finite steps in a row.

    The strategy has left the weights as they were on such steps. Counting stays on the device and is read every `every`
    steps and at the end, so that a run which logs rarely does not wait for the device more often. Loss and norm are
    the same on all ranks, so all raise together.
    """

    def __init__(self, allowed: int, every: int) -> None:
        self._allowed = allowed
        self._every = every
        self._in_a_row: Tensor | None = None
        self._most_in_a_row: Tensor | None = None

    def after_step(self, result: StepResult) -> None:
        finite = torch.isfinite(result.loss.loss) & torch.isfinite(result.grad_norm)
        if self._in_a_row is None or self._most_in_a_row is None:
            self._in_a_row = self._most_in_a_row = torch.zeros_like(finite, dtype=torch.int64)
        self._in_a_row = torch.where(finite, 0, self._in_a_row + 1)
        self._most_in_a_row = torch.maximum(self._most_in_a_row, self._in_a_row)
        if result.state.step % self._every == 0:
            self._check(result.state.step)

    def end(self, state: TrainingState) -> None:
        self._check(state.step)

    def _check(self, step: int) -> None:
        if self._most_in_a_row is not None and (count := int(self._most_in_a_row)) > self._allowed:
            raise DivergedError(
                f"the loss or its gradient was not finite on {count} steps in a row, at step {step}; the weights were "
                "left as they were before these steps. Lower optimizer.learning_rate; in fp16, bf16 and fp32 have more "
                "range."
            )
