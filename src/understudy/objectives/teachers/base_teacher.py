"""A student's own base as its teacher: the same weights, with the adapter switched off."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from understudy.contracts import Batch
from understudy.models.head import LossHead
from understudy.objectives.targets import DenseTargets
from understudy.objectives.teachers.teacher import supervised_positions

__all__ = ["BaseTeacher"]


class BaseTeacher:
    """`hidden` gives the student's final hidden states at given positions (`Strategy.hidden`), and inside
    `without_adapter()` those of its base. `head` is the student's own, which must be frozen."""

    def __init__(
        self,
        hidden: Callable[[Batch, Tensor], Tensor],
        without_adapter: Callable[[], AbstractContextManager[None]],
        head: LossHead,
    ) -> None:
        self._hidden = hidden
        self._without_adapter = without_adapter
        self._head = head

    def targets(self, batch: Batch) -> DenseTargets:
        with self._without_adapter():
            hidden = self._hidden(batch, supervised_positions(batch))
        # The head computes the student's loss when it asks for logits, so that its weight is whole whoever shards it.
        return DenseTargets.through(hidden, self._head)
