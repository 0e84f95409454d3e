"""The console: a live progress bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from understudy.training.console import duration
from understudy.training.sinks.registry import Answer, Row, RunFacts, Sink

__all__ = ["make"]

LINE_SECONDS = 5.0
"""Least time between two plain lines of training; the first and the last step always have one."""
SHOWN_ANSWERS = 3
SHOWN_CHARACTERS = 160


class ConsoleSink(Sink, ABC):
    """What both kinds of console show of evaluations; training rows are the subclasses' business."""

    def __init__(self, facts: RunFacts) -> None:
        self._console = facts.console
        self._total_steps = facts.total_steps
        self._before: Sequence[Answer] = ()

    def row(self, row: Row) -> None:
        if "eval_loss" in row:
            self._console.say(evaluation_line(row))
        else:
            self.training_row(row)

    @abstractmethod
    def training_row(self, row: Row) -> None: ...

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        for number, answer in enumerate(answers[:SHOWN_ANSWERS]):
            said = _shown(answer)
            if self._before:
                said = f"{_shown(self._before[number])} before training, now {said}"
            self._console.say(f"  {_tail(answer.prompt)} → {said} (expected {_head(answer.expected)})")
        if answers and self._before and step == self._total_steps:
            self._console.say(
                f"exact match on {len(answers)} evaluation prompts: {_exact_match(self._before):.1%} before training, "
                f"{_exact_match(answers):.1%} after"
            )
        if step == 0:  # a run that goes on does not ask before training
            self._before = answers


class LiveConsoleSink(ConsoleSink):
    """A progress bar with loss, speed and time left."""

    def __init__(self, facts: RunFacts) -> None:
        super().__init__(facts)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=facts.console.screen,
        )
        self._task = self._progress.add_task(
            "training", total=facts.total_steps, completed=facts.first_step, figures=""
        )
        self._progress.start()

    def training_row(self, row: Row) -> None:
        figures = f"loss {row['loss']:.4f} · {_count(row['tokens_per_second'])} tokens/s"
        self._progress.update(self._task, completed=int(row["step"]), figures=figures)

    def close(self) -> None:
        self._progress.stop()


class PlainConsoleSink(ConsoleSink):
    """Lines that read well in a log."""

    def __init__(self, facts: RunFacts) -> None:
        super().__init__(facts)
        self._first: tuple[float, float] | None = None
        self._next_line = 0.0

    def training_row(self, row: Row) -> None:
        now = time.monotonic()
        step = row["step"]
        self._first = self._first or (now, step)
        if now < self._next_line and step != self._total_steps and "skipped" not in row:
            return
        self._next_line = now + LINE_SECONDS
        self._console.say(training_line(row, self._total_steps, self._seconds_left(now, step)))

    def _seconds_left(self, now: float, step: float) -> float | None:
        assert self._first is not None
        began, first_step = self._first
        return (now - began) / (step - first_step) * (self._total_steps - step) if step > first_step else None


def training_line(row: Row, total_steps: int, seconds_left: float | None) -> str:
    """`step 20/400  epoch 0.5  loss 1.2345  …`"""
    parts = [
        f"step {int(row['step'])}/{total_steps}",
        f"epoch {row['epoch']:.2f}",
        f"loss {row['loss']:.4f}",
        f"lr {row['learning_rate']:.2e}",
        f"grad norm {row['grad_norm']:.3f}",
        f"{_count(row['tokens_per_second'])} tokens/s",
    ]
    if "skipped" in row:
        parts.append("skipped: loss or gradient is not finite")
    if seconds_left is not None:
        parts.append(f"left {duration(seconds_left)}")
    return "  ".join(parts)


def evaluation_line(row: Row) -> str:
    """`evaluation at step 20: loss 1.2345, perplexity 3.44, …`"""
    names = {
        "eval_loss": ("loss", "{:.4f}"),
        "eval_perplexity": ("perplexity", "{:.2f}"),
        "eval_token_accuracy": ("token accuracy", "{:.1%}"),
        "eval_divergence": ("divergence", "{:.4f}"),
        "eval_hidden_states": ("hidden states", "{:.4f}"),
        "eval_teacher_agreement": ("agreement with the teacher", "{:.1%}"),
        "eval_calibration_error": ("calibration error", "{:.3f}"),
        "eval_exact_match": ("exact match", "{:.1%}"),
    }
    shown = [f"{name} {form.format(row[key])}" for key, (name, form) in names.items() if key in row]
    return f"evaluation at step {int(row['step'])}: " + ", ".join(shown)


def make(facts: RunFacts) -> Sink:
    return LiveConsoleSink(facts) if facts.console.screen.is_terminal else PlainConsoleSink(facts)


def _exact_match(answers: Sequence[Answer]) -> float:
    return sum(answer.correct for answer in answers) / len(answers)


def _shown(answer: Answer) -> str:
    return _head(answer.text) or "(nothing)"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 10_000 else f"{number / 1000:,.1f}k"


def _head(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + "…"


def _tail(text: str) -> str:
    """A prompt's end is what is asked."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else "…" + line[-SHOWN_CHARACTERS:]
