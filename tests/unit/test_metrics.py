"""Rows of metrics, and the sinks they go to."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import rich.console
import torch

from understudy.contracts import Batch, GlobalBatch, LossSum
from understudy.launch.run_directory import RunDirectory
from understudy.training.console import Console
from understudy.training.hooks import StepResult, TrainingState
from understudy.training.memory_line import memory_line
from understudy.training.metrics import MetricsHook, evaluation_metrics
from understudy.training.sinks.console import training_line
from understudy.training.sinks.registry import Answer, Row, RunFacts, Sink, make_sinks

pytestmark = pytest.mark.unit

COLUMNS = {
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "supervised_tokens",
    "tokens_per_second",
    "step_seconds",
    "memory_peak_bytes",
}


class Rows(Sink):
    def __init__(self) -> None:
        self.rows: list[Row] = []

    def row(self, row: Row) -> None:
        self.rows.append(row)


def result(step: int, loss: float = 8.0, tokens: int = 30) -> StepResult:
    batch = GlobalBatch((Batch.of([]),), num_tokens=4, num_input_tokens=tokens, examples=(0,), epoch=step / 10)
    state = TrainingState(step, step / 10, tokens * step)
    return StepResult(state, batch, LossSum(torch.tensor(loss), torch.tensor(4), {}), torch.tensor(0.5), 0.01)


def logged(every: int, total_steps: int, times: Iterator[float]) -> list[Row]:
    sink = Rows()
    hook = MetricsHook(
        [sink], every=every, total_steps=total_steps, memory_peak_bytes=lambda: 77, clock=lambda: next(times)
    )
    for step in range(1, total_steps + 1):
        hook.before_step(TrainingState(step - 1))
        hook.after_step(result(step))
    return sink.rows


def test_a_row_has_the_promised_columns_and_the_mean_loss_of_a_supervised_token() -> None:
    (row,) = logged(1, 1, iter([0.0, 2.0]))
    assert set(row) == COLUMNS
    assert row == {
        "step": 1,
        "epoch": 0.1,
        "loss": 2.0,
        "learning_rate": 0.01,
        "grad_norm": 0.5,
        "tokens": 30,
        "supervised_tokens": 4,
        "tokens_per_second": 15.0,
        "step_seconds": 2.0,
        "memory_peak_bytes": 77,
    }


def test_a_row_has_what_was_predicted_beside_what_was_measured_and_the_end_compares_them() -> None:
    sink = Rows()
    hook = MetricsHook([sink], every=1, total_steps=1, memory_peak_bytes=lambda: 77, memory_predicted_bytes=70)
    hook.before_step(TrainingState())
    hook.after_step(result(1))
    assert set(sink.rows[0]) == COLUMNS | {"memory_predicted_bytes"}
    assert (sink.rows[0]["memory_peak_bytes"], sink.rows[0]["memory_predicted_bytes"]) == (77, 70)
    line = memory_line(8 * 2**30, 10 * 2**30)
    assert line == "memory: planned 8.00 GiB, measured 10.00 GiB a process (125%)"
    assert memory_line(None, 2**30) is None


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 0.5), (8.0, float("inf"))])
def test_a_step_that_was_left_out_says_so(loss: float, norm: float) -> None:
    sink = Rows()
    hook = MetricsHook([sink], every=1, total_steps=2, memory_peak_bytes=lambda: 77)
    hook.before_step(TrainingState())
    hook.after_step(replace(result(1, loss), grad_norm=torch.tensor(norm)))
    assert sink.rows[0]["skipped"] == 1
    assert "skipped: loss or gradient is not finite" in training_line(sink.rows[0], 2, None)


def test_speed_covers_the_steps_since_the_last_row_without_the_time_between_steps() -> None:
    # Steps take 1, 3 and 2 seconds; 100 seconds pass between them.
    rows = logged(2, 3, iter([0.0, 1.0, 101.0, 104.0, 204.0, 206.0]))
    assert [(row["step"], row["step_seconds"], row["tokens_per_second"]) for row in rows] == [(2, 2, 15), (3, 2, 15)]


def test_evaluation_figures_are_over_supervised_tokens() -> None:
    total = LossSum(torch.tensor(6.0), torch.tensor(4), {"correct": torch.tensor(3)})
    assert evaluation_metrics(total) == {
        "eval_loss": 1.5,
        "eval_perplexity": math.exp(1.5),
        "eval_token_accuracy": 0.75,
    }


def test_an_evaluation_of_no_token_is_not_a_number_and_a_huge_loss_overflows_to_infinity() -> None:
    assert math.isnan(evaluation_metrics(LossSum(torch.tensor(0.0), torch.tensor(0), {}))["eval_loss"])
    assert evaluation_metrics(LossSum(torch.tensor(1e4), torch.tensor(1), {}))["eval_perplexity"] == math.inf


def facts(tmp_path: Path, *, terminal: bool = False) -> tuple[RunFacts, io.StringIO]:
    stream = io.StringIO()
    screen = rich.console.Console(file=stream, force_terminal=terminal, width=100)
    return RunFacts(RunDirectory(tmp_path), Console(screen), total_steps=100), stream


def test_jsonl_is_strict_json_a_row_a_line_readable_at_once(tmp_path: Path) -> None:
    (sink,) = make_sinks(["jsonl"], facts(tmp_path)[0])
    sink.row({"step": 1, "loss": math.nan})
    sink.row({"step": 2, "loss": 1.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": None}, {"step": 2, "loss": 1.5}]
    sink.close()


def test_tensorboard_holds_every_scalar(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (sink,) = make_sinks(["tensorboard"], facts(tmp_path)[0])
    sink.row({"step": 3, "epoch": 0.5, "loss": 1.5})
    sink.row({"step": 3, "epoch": 0.5, "eval_loss": 2.5})
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == [(3, 2.5)]


def test_a_plain_console_says_the_first_and_last_step_and_not_all_between(tmp_path: Path) -> None:
    run, stream = facts(tmp_path)
    (sink,) = make_sinks(["console"], run)
    for row in logged(1, 100, iter(float(i) for i in range(1000))):
        sink.row(row)
    sink.row({"step": 100, "epoch": 1.0, "eval_loss": 0.5, "eval_exact_match": 0.925})
    sink.answers(100, [Answer("2 + 2 =", "4", "4"), Answer("2 + 3 =", "", "5")])
    sink.close()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 1/100  epoch 0.10  loss 2.0000  lr 1.00e-02")
    assert lines[1].startswith("step 100/100")
    assert lines[2] == "evaluation at step 100: loss 0.5000, exact match 92.5%"
    assert lines[3:] == ["  2 + 2 = → 4 (expected 4)", "  2 + 3 = → (nothing) (expected 5)"]


def test_a_run_that_goes_on_calls_nothing_the_answers_before_training(tmp_path: Path) -> None:
    run, stream = facts(tmp_path)
    (sink,) = make_sinks(["console"], run)
    for step in (50, 100):
        sink.answers(step, [Answer("2 + 2 =", "4", "4")])
    sink.close()
    assert stream.getvalue().splitlines() == ["  2 + 2 = → 4 (expected 4)"] * 2


def test_the_last_evaluation_says_what_was_answered_before_training_and_after(tmp_path: Path) -> None:
    run, stream = facts(tmp_path)
    (sink,) = make_sinks(["console"], run)
    sink.answers(0, [Answer("2 + 2 =", "7 7", "4"), Answer("2 + 3 =", "", "5")])
    sink.answers(100, [Answer("2 + 2 =", "4", "4"), Answer("2 + 3 =", "6", "5")])
    sink.close()
    assert stream.getvalue().splitlines()[2:] == [
        "  2 + 2 = → 7 7 before training, now 4 (expected 4)",
        "  2 + 3 = → (nothing) before training, now 6 (expected 5)",
        "exact match on 2 evaluation prompts: 0.0% before training, 50.0% after",
    ]


def test_a_terminal_gets_a_progress_bar_with_loss_and_speed(tmp_path: Path) -> None:
    run, stream = facts(tmp_path, terminal=True)
    (sink,) = make_sinks(["console"], run)
    for row in logged(1, 100, iter(float(i) for i in range(1000))):
        sink.row(row)
    sink.close()
    assert "100/100" in stream.getvalue()
    assert "loss 2.0000" in stream.getvalue()


def test_a_line_of_training_names_the_time_left() -> None:
    (row,) = logged(1, 1, iter([0.0, 2.0]))
    assert training_line(row, 100, 3725).endswith("15 tokens/s  left 1:02:05")
