"""The rows of metrics.jsonl: what a logged step says of itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

from understudy.contracts import LossSum
from understudy.objectives.calibration import calibration_error
from understudy.training.hooks import Hook, StepResult, TrainingState
from understudy.training.sinks.registry import Row, Sink

__all__ = ["MetricsHook", "evaluation_metrics"]


PARTS = ("divergence", "cross_entropy", "hidden_states")
"""Of a loss of several parts: each is logged too, a supervised token."""


class MetricsHook(Hook):
    """Gives a row to every sink each `every` steps, and for the last step.

    `loss`, `grad_norm`, `tokens` and `supervised_tokens` are of that step; `tokens_per_second` (real tokens over all
    ranks) and `step_seconds` (a mean) cover the steps since the last row, without what other hooks do between steps.
    `memory_peak_bytes` is this process's since training began, beside `memory_predicted_bytes` where it was planned.
    `skipped` is there, and 1, when loss or gradient were not finite; `on_policy` when the student trained on its own
    answers.
    The device is read once a row. Sinks exist on rank 0 only; the other ranks have none and do nothing.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        every: int,
        total_steps: int,
        memory_peak_bytes: Callable[[], int],
        memory_predicted_bytes: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._sinks = sinks
        self._every = every
        self._total_steps = total_steps
        self._memory_peak_bytes = memory_peak_bytes
        self._memory_predicted_bytes = memory_predicted_bytes
        self._clock = clock
        self._began = 0.0
        self._forget_interval()

    def before_step(self, state: TrainingState) -> None:
        self._began = self._clock()

    def after_step(self, result: StepResult) -> None:
        if not self._sinks:
            return
        step = result.state.step
        logged = step % self._every == 0 or step == self._total_steps
        if logged:  # waits for the device, so it belongs into the step's time
            sums = [result.loss.loss, result.grad_norm, *(result.loss.metrics.get(name) for name in PARTS)]
            loss, norm, *parts = torch.stack([value.float() for value in sums if value is not None]).tolist()
        self._seconds += self._clock() - self._began
        self._steps += 1
        self._tokens += result.batch.num_input_tokens
        if logged:
            row = self._row(result, loss / result.batch.num_tokens, norm)
            names = [name for name in PARTS if name in result.loss.metrics]
            row = {**row, **{name: value / result.batch.num_tokens for name, value in zip(names, parts)}}
            for sink in self._sinks:
                sink.row(row)
            self._forget_interval()

    def _row(self, result: StepResult, loss: float, norm: float) -> Row:
        row: dict[str, float] = {
            "step": result.state.step,
            "epoch": result.state.epoch,
            "loss": loss,
            "learning_rate": result.learning_rate,
            "grad_norm": norm,
            "tokens": result.batch.num_input_tokens,
            "supervised_tokens": result.batch.num_tokens,
            "tokens_per_second": self._tokens / self._seconds,
            "step_seconds": self._seconds / self._steps,
            "memory_peak_bytes": self._memory_peak_bytes(),
        }
        if self._memory_predicted_bytes is not None:
            row["memory_predicted_bytes"] = self._memory_predicted_bytes
        if result.batch.on_policy:
            row["on_policy"] = 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            row["skipped"] = 1  # the strategy has left the weights alone
        return row

    def _forget_interval(self) -> None:
        self._seconds, self._steps, self._tokens = 0.0, 0, 0


_EVALUATED = {"correct": "eval_token_accuracy", "agreement": "eval_teacher_agreement"}


def evaluation_metrics(total: LossSum) -> Row:
    """`eval_loss` (nats a supervised token), `eval_perplexity` (of the cross-entropy, where the loss has other parts),
    `eval_token_accuracy` where the objective counts `correct` tokens, `eval_calibration_error` where it sums what that
    takes, and what else it sums. Sums over no token at all give NaN."""
    metrics = {name: value.double().cpu() for name, value in total.metrics.items()}
    gaps = metrics.pop("calibration", None)
    count = int(total.num_tokens)
    mean = float(total.loss) / count if count else math.nan
    row = {"eval_loss": mean}
    for name, value in metrics.items():
        row[_EVALUATED.get(name, f"eval_{name}")] = float(value) / count if count else math.nan
    if gaps is not None:
        row["eval_calibration_error"] = calibration_error(gaps, count) if count else math.nan
    # exp overflows past 709 nats; such a model is as good as infinitely perplexed.
    entropy = row.get("eval_cross_entropy", mean)
    return row | {"eval_perplexity": math.exp(entropy) if not entropy > 700 else math.inf}
