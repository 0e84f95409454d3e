"""When checkpoints are written: every so many steps, at the end, and when a signal asks to stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from understudy.checkpoint.progress import Progress
from understudy.checkpoint.saver import CheckpointSaver
from understudy.errors import LostTeacherError, StoppedError, StoppedWaitingError
from understudy.recipe.schema import Checkpoint
from understudy.training.evaluation import EvaluationHook
from understudy.training.hooks import Hook, StepResult, TrainingState, interval_steps
from understudy.training.stopping import StopRequest

__all__ = ["CheckpointHook", "most_checkpoints"]


def most_checkpoints(settings: Checkpoint, total_steps: int) -> int:
    """Checkpoints that a run has on the disk at one time, the one that is being written among them."""
    every = interval_steps(settings.every, total_steps)
    written = 1 if every is None else -(-total_steps // every)
    return min(written, settings.keep + settings.keep_best + 1)


class CheckpointHook(Hook):
    """Saves after every `every`th step (not at all when None) and after the last. On a request to stop it saves after
    the step in flight and raises `StoppedError` once that is committed, on all ranks alike. Interrupted, it saves after
    the last step, and raises the error again with the checkpoint's place.

    With `evaluate_first`, each checkpoint but one on request is evaluated first, so that the best can be told.
    """

    def __init__(
        self,
        saver: CheckpointSaver,
        *,
        every: int | None,
        total_steps: int,
        progress: Callable[[TrainingState, float | None], Progress],
        stop: StopRequest,
        evaluation: EvaluationHook | None,
        evaluate_first: bool,
        location: Callable[[int], Path],
        say: Callable[[str], None],
    ) -> None:
        """`progress` makes what is saved beside the tensors, given the evaluation loss where there is one; `location`
        tells where the checkpoint of a step is."""
        self._saver = saver
        self._every = every
        self._total_steps = total_steps
        self._progress = progress
        self._stop = stop
        self._evaluation = evaluation
        self._evaluate_first = evaluate_first
        self._location = location
        self._say = say
        self._saved_step: int | None = None

    def start(self, state: TrainingState) -> None:
        # A run that resumed has the checkpoint that it resumed from.
        self._saved_step = state.step or None

    def before_step(self, state: TrainingState) -> None:
        self._stop.exchange()

    def after_step(self, result: StepResult) -> None:
        self._report()
        state = result.state
        if (signal := self._stop.agreed()) is not None:
            self._save(state)
            self._saver.wait()
            raise StoppedError(
                f"stopped by {signal.name} after step {state.step}; its checkpoint is {self._location(state.step)}. "
                "Run the same command again to go on."
            )
        # The last step's waits for the evaluation at the end, whose loss it records.
        if self._every is not None and state.step % self._every == 0 and state.step != self._total_steps:
            self._evaluate_and_save(state)

    def end(self, state: TrainingState) -> None:
        if self._saved_step != state.step:
            self._evaluate_and_save(state)
        self._saver.wait()
        self._report()

    def interrupted(self, state: TrainingState, error: LostTeacherError | StoppedWaitingError) -> None:
        self._stop.settle()
        if self._saved_step != state.step and state.step:
            self._save(state)
        self._saver.wait()
        self._report()
        kept = (
            f"the checkpoint of step {state.step} is {self._location(state.step)}" if state.step else "no step is done"
        )
        if isinstance(error, StoppedWaitingError):
            raise StoppedError(f"{error}; {kept}. Run the same command again to go on.") from error
        raise LostTeacherError(f"{error}; {kept}. Put that right, then run the same command again to go on.") from error

    def _evaluate_and_save(self, state: TrainingState) -> None:
        if self._evaluation is not None and self._evaluate_first:
            self._evaluation.evaluate_once(state)
        self._save(state)

    def _save(self, state: TrainingState) -> None:
        loss = None if self._evaluation is None else self._evaluation.loss_at(state.step)
        self._saver.save(self._progress(state, loss))
        self._saved_step = state.step

    def _report(self) -> None:
        for committed in self._saver.check():
            self._say(f"checkpoint: {committed}")
