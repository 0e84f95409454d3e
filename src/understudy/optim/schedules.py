"""Learning rates as pure functions of the step: nothing to save, nothing to restore (P1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from understudy.recipe.schema import Schedule

__all__ = ["make_schedule"]


@dataclass(frozen=True)
class _Run:
    """What a shape may depend on besides the step."""

    schedule: Schedule
    total_steps: int
    steps_per_epoch: int
    peak_step: int
    """The first step at the peak: the last of the warmup, or step 0 without one."""

    def progress(self, step: int, start: int) -> float:
        """0 at step `start` and before, 1 at the last step and after; 0 throughout when `start` is the last step."""
        last = self.total_steps - 1
        return 0.0 if last <= start else min(max((step - start) / (last - start), 0.0), 1.0)

    def between(self, share: float) -> float:
        """From `share` of the way down to the minimum: 1 is the peak, 0 the minimum; both exact, and never rising as
        `share` falls, not even by rounding."""
        minimum = self.schedule.min_ratio
        return 1.0 if share == 1.0 else min(1.0, minimum + share * (1.0 - minimum))


def make_schedule(schedule: Schedule, *, peak: float, total_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate of a step, given its 0-based number.

    Warmup is linear and its step 0 already learns, with `peak` / warmup steps; its last step has `peak`. The decaying
    kinds reach `peak * min_ratio` exactly at step `total_steps - 1` and stay there. When the warmup takes the whole run
    there is no decay.
    """
    warmup_steps = min(math.ceil(schedule.warmup_ratio * total_steps), total_steps)
    run = _Run(schedule, total_steps, steps_per_epoch, peak_step=max(warmup_steps - 1, 0))
    shape = _SHAPES[schedule.kind]

    def learning_rate(step: int) -> float:
        if step < run.peak_step:
            return peak * (step + 1) / warmup_steps
        return peak * shape(run, step)

    return learning_rate


def _cosine(run: _Run, step: int) -> float:
    return run.between((1.0 + math.cos(math.pi * run.progress(step, run.peak_step))) / 2.0)


def _linear(run: _Run, step: int) -> float:
    return run.between(1.0 - run.progress(step, run.peak_step))


def _constant(run: _Run, step: int) -> float:
    return 1.0


def _polynomial(run: _Run, step: int) -> float:
    return run.between((1.0 - run.progress(step, run.peak_step)) ** run.schedule.power)


def _wsd(run: _Run, step: int) -> float:
    """Warmup, stable, decay (Hu et al., 2024, "MiniCPM"): linear to the minimum over the last `decay_ratio`."""
    decay_steps = math.ceil(run.schedule.decay_ratio * run.total_steps)
    if decay_steps == 0:
        return 1.0
    last_stable_step = max(run.total_steps - 1 - decay_steps, run.peak_step)
    return run.between(1.0 - run.progress(step, last_stable_step))


def _step(run: _Run, step: int) -> float:
    """`gamma` once for each `step_epochs` epochs completed, not counting those that the warmup took, never below the
    minimum."""
    period = run.steps_per_epoch * run.schedule.step_epochs
    drops = step // period - run.peak_step // period
    return max(run.schedule.gamma**drops, run.schedule.min_ratio)


_SHAPES: dict[str, Callable[[_Run, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "polynomial": _polynomial,
    "wsd": _wsd,
    "step": _step,
}
