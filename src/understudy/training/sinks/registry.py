"""Finds a sink by its name: `sinks/<name>.py`, whose `make` builds it. A new file is a new sink."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from understudy.launch.run_directory import RunDirectory
from understudy.training.console import Console

__all__ = ["Answer", "Row", "RunFacts", "Sink", "make_sinks"]

Row = Mapping[str, float]
"""Numbers by name; `step` and `epoch` among them. May hold NaN and infinities."""


@dataclass(frozen=True)
class Answer:
    """What the model said to an evaluation prompt."""

    prompt: str
    text: str
    expected: str

    @property
    def correct(self) -> bool:
        return self.text == self.expected


@dataclass(frozen=True)
class RunFacts:
    """What a sink may need to know to write or show rows."""

    directory: RunDirectory
    console: Console
    total_steps: int
    first_step: int = 0
    """Steps done before this process began: more than 0 in a run that was resumed."""


class Sink:
    """Where rows go. Lives on rank 0."""

    def row(self, row: Row) -> None:
        """A row of training (it has `loss`) or of evaluation (it has `eval_loss`)."""

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """What the model says at `step`."""

    def close(self) -> None:
        """Everything given is on disk or on the screen afterwards."""


class _Make(Protocol):
    def make(self, facts: RunFacts) -> Sink: ...


def make_sinks(names: Sequence[str], facts: RunFacts) -> list[Sink]:
    """The sinks a recipe names."""
    return [cast(_Make, importlib.import_module(f"understudy.training.sinks.{name}")).make(facts) for name in names]
