"""How a process shows that it gets on, for its pulse to tell: without, it cannot be told from one that hangs."""

from __future__ import annotations

import threading

from torch import nn

from understudy.contracts import Batch, LossSum, Objective
from understudy.launch.pulses import STARTING, TRAINING
from understudy.training.hooks import Hook, StepResult, TrainingState

__all__ = ["Headway", "MarkedObjective"]


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
        self._steps_here = 0

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

    def after_step(self, result: StepResult) -> None:
        self.step = result.state.step
        self._steps_here += 1


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
