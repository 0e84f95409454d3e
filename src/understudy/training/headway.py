"""How a process shows that it gets on, for its pulse to tell: without, it cannot be told from one that hangs."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from torch import nn

from understudy.contracts import Batch, LossSum, Objective
from understudy.launch.pulses import STARTING, TRAINING
from understudy.training.hooks import Hook, StepResult, TrainingState

__all__ = ["Headway", "MarkedObjective"]


STEPS = 64
NEVER_NS = 2**63


class Headway(Hook):
    """What a process is at, and how often it got on with it."""

    def __init__(self) -> None:
        self.phase = STARTING
        """One of `launch.pulses.PHASES`."""
        self.changed = threading.Event()
        """Set when another phase begins, or nothing more is to be told."""
        self.marks = 0
        self.step: int | None = None
        """Optimizer steps done; None before training."""
        self.step_seconds: float | None = None
        """That the last one took."""
        self.clock_lead_ns = 0
        """That this process's clock is ahead of rank 0's."""
        self._steps_here = 0
        self._began_ns: int | None = None
        self._steps: deque[tuple[int, int]] = deque(maxlen=STEPS)
        """When each of the last ones began and ended."""

    def mark(self) -> None:
        """From any thread: something is done that others, or the user, wait for."""
        self.marks += 1

    def begin(self, phase: str) -> None:
        self.phase = phase
        self.changed.set()

    @property
    def shown_by_computing(self) -> bool:
        """Whether this process is at something that gives no marks, and takes long where a model is large: loading,
        saving, the first step, in which code is compiled."""
        return self.phase != TRAINING or not self._steps_here

    def start(self, state: TrainingState) -> None:
        self.step = state.step

    def before_step(self, state: TrainingState) -> None:
        self._began_ns = time.time_ns()

    def after_step(self, result: StepResult) -> None:
        assert self._began_ns is not None, "before_step comes first"
        ended_ns = time.time_ns()
        self._steps.append((self._began_ns, ended_ns))
        self.step_seconds = (ended_ns - self._began_ns) / 1e9
        self._began_ns = None
        self.step = result.state.step
        self._steps_here += 1

    def within_steps(self, times_ns: Sequence[int]) -> list[bool]:
        """Whether each is in one of the last steps, or in the one under way."""
        began = self._began_ns  # first: a step that ends now is found among the others
        steps = list(self._steps)
        if began is not None:
            steps.append((began, NEVER_NS))
        places = [bisect_right(steps, (at, NEVER_NS)) - 1 for at in times_ns]
        return [place >= 0 and at <= steps[place][1] for place, at in zip(places, times_ns)]


class MarkedObjective:
    """`objective`, each of whose micro-batches, trained on or evaluated, is a mark."""

    def __init__(self, objective: Objective, headway: Headway) -> None:
        self._objective = objective
        self._headway = headway

    def prepare(self, batch: Batch) -> Batch:
        self._headway.mark()
        return self._objective.prepare(batch)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        self._headway.mark()
        return self._objective.loss(model, batch)
