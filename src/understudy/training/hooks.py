"""What happens around the steps: the moments, and what is known at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from understudy.contracts import GlobalBatch, LossSum
from understudy.errors import LostTeacherError, StoppedWaitingError

__all__ = ["Hook", "HookList", "StepResult", "TrainingState", "interval_steps"]


@dataclass(frozen=True)
class TrainingState:
    """How far training is. With the recipe it determines everything but weights and moments (P1)."""

    step: int = 0
    """Optimizer steps done."""
    epoch: float = 0.0
    """Epochs done."""
    tokens: int = 0
    """Real tokens seen, over all ranks."""

    def advance(self, batch: GlobalBatch) -> TrainingState:
        return TrainingState(self.step + 1, batch.epoch, self.tokens + batch.num_input_tokens)


@dataclass(frozen=True)
class StepResult:
    """What one step did. Tensors are on the device; reading them waits for it."""

    state: TrainingState
    """After the step."""
    batch: GlobalBatch
    loss: LossSum
    """Sums over all ranks."""
    grad_norm: Tensor
    """Global, before clipping, scalar fp32."""
    learning_rate: float


class Hook:
    """Does nothing at any moment; subclasses choose theirs. Every rank runs the same hooks in the same order, so a hook
    may use collectives."""

    def start(self, state: TrainingState) -> None:
        """Before the first step."""

    def before_step(self, state: TrainingState) -> None:
        """Before a step's data is read."""

    def after_step(self, result: StepResult) -> None:
        """After the optimizer step."""

    def end(self, state: TrainingState) -> None:
        """After the last step."""

    def interrupted(self, state: TrainingState, error: LostTeacherError | StoppedWaitingError) -> None:
        """Where training cannot go on now, on all ranks alike, wherever it was but not within a step: in place of all
        later moments. May raise what says more than `error`, which is raised after it."""


class HookList(Hook):
    """Several hooks as one, called in order."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = hooks

    def start(self, state: TrainingState) -> None:
        for hook in self._hooks:
            hook.start(state)

    def before_step(self, state: TrainingState) -> None:
        for hook in self._hooks:
            hook.before_step(state)

    def after_step(self, result: StepResult) -> None:
        for hook in self._hooks:
            hook.after_step(result)

    def end(self, state: TrainingState) -> None:
        for hook in self._hooks:
            hook.end(state)

    def interrupted(self, state: TrainingState, error: LostTeacherError | StoppedWaitingError) -> None:
        for hook in self._hooks:
            hook.interrupted(state, error)


def interval_steps(every: float | None, total_steps: int) -> int | None:
    """Steps between two evaluations or checkpoints: `every` itself, or that fraction of the run, at least one step."""
    if every is None or isinstance(every, int):
        return every
    return max(1, round(every * total_steps))
