"""Several teachers at once, each with a share of the divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from understudy.contracts import Batch
from understudy.objectives.targets import SeveralTargets, WeightedTargets
from understudy.objectives.teachers.teacher import Teaching

__all__ = ["SeveralTeachers"]


class SeveralTeachers:
    """Asks each of them about each batch. Their shares add up to 1."""

    def __init__(self, members: tuple[tuple[float, Teaching], ...]) -> None:
        self._members = members

    def ask(self, batches: Sequence[Batch]) -> list[tuple[Any, ...]]:
        """What those of them say that are asked before the step, and None of each other."""
        nothing = (None,) * len(batches)
        return list(zip(*(teaching.ask(batches) if teaching.ask else nothing for _, teaching in self._members)))

    def targets(self, batch: Batch) -> SeveralTargets:
        told = batch.targets or (None,) * len(self._members)
        return SeveralTargets(
            tuple(
                WeightedTargets(
                    share, teaching.shared_classes, teaching.teacher.targets(replace(batch, targets=before))
                )
                for (share, teaching), before in zip(self._members, told, strict=True)
            )
        )
