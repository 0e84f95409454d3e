"""A student's own base as its teacher: the same weights, with the adapter switched off."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from understudy.contracts import Batch, Strategy
from understudy.models.head import LossHead
from understudy.objectives.hidden_states import LayerPair, TargetsOfLayers
from understudy.objectives.targets import DenseTargets
from understudy.objectives.teachers.teacher import supervised_positions

__all__ = ["BaseTeacher"]


class BaseTeacher:
    """`strategy` gives the student's hidden states, and inside `without_adapter()` those of its base. `head` is the
    student's own, which must be frozen. With `pairs`, it also gives what the base's layers in them put out."""

    def __init__(
        self,
        strategy: Strategy,
        without_adapter: Callable[[], AbstractContextManager[None]],
        head: LossHead,
        pairs: tuple[LayerPair, ...] = (),
    ) -> None:
        self._strategy = strategy
        self._without_adapter = without_adapter
        self._head = head
        self._pairs = pairs

    def targets(self, batch: Batch) -> DenseTargets:
        layers = [layer for _, layer in self._pairs]
        with self._without_adapter():
            hidden = self._strategy.hidden(batch, supervised_positions(batch), layers)
        # The head computes the student's loss when it asks for logits, so that its weight is whole whoever shards it.
        targets = DenseTargets.through(hidden.last, self._head)
        if not self._pairs:
            return targets
        return TargetsOfLayers(targets.logits, targets.count, self._pairs, hidden.layers)
