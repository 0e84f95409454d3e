"""Who says what the student should have said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from understudy.contracts import IGNORED, Batch
from understudy.objectives.targets import Targets

__all__ = ["Teacher", "Teaching", "documents_of", "supervised_positions"]


class Teacher(Protocol):
    def targets(self, batch: Batch) -> Targets:
        """About the supervised positions of `batch`, in order, on its device. Runs without gradient. May be a
        collective: every rank calls it for each of its micro-batches, an empty one included. One that is asked before
        the step finds in `batch.targets` what it said then."""
        ...


class Teaching(NamedTuple):
    """A teacher, and what of its vocabulary is the student's too."""

    teacher: Teacher
    shared_classes: int | None
    """The first so many classes mean the same to both; None where its targets say so themselves."""
    ask: Callable[[Sequence[Batch]], Sequence[Any]] | None = None
    """For one that is asked before the step, what it says about each batch, for `Batch.targets`. It may take long, on a
    thread of its own; no collective. Raises `ServerError`."""
    held_bytes: int = 0
    """Of weights in this process, beside the student's."""


def supervised_positions(batch: Batch) -> Tensor:
    """[N] int64: where `batch` has labels."""
    return (batch.labels != IGNORED).nonzero().squeeze(1)


def documents_of(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Of each document of `batch`, on the CPU: its tokens [L], and at which of them the next is supervised [L]."""
    tokens, supervised = batch.tokens.cpu(), (batch.labels != IGNORED).cpu()
    return [(tokens[start:end], supervised[start:end]) for start, end in pairwise(batch.document_offsets.tolist())]
