"""Who says what the student should have said."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from understudy.contracts import IGNORED, Batch
from understudy.objectives.targets import Targets

__all__ = ["Teacher", "Teaching", "supervised_positions"]


class Teacher(Protocol):
    def targets(self, batch: Batch) -> Targets:
        """About the supervised positions of `batch`, in order, on its device. Runs without gradient. May be a
        collective: every rank calls it for each of its micro-batches, an empty one included."""
        ...


class Teaching(NamedTuple):
    """A teacher, and what of its vocabulary is the student's too."""

    teacher: Teacher
    shared_classes: int | None
    """The first so many classes mean the same to both; None where its targets say so themselves."""


def supervised_positions(batch: Batch) -> Tensor:
    """[N] int64: where `batch` has labels."""
    return (batch.labels != IGNORED).nonzero().squeeze(1)
