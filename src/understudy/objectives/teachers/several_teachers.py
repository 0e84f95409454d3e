"""Several teachers at once, each with a share of the divergence."""

from __future__ import annotations

from understudy.contracts import Batch
from understudy.objectives.targets import SeveralTargets, WeightedTargets
from understudy.objectives.teachers.teacher import Teaching

__all__ = ["SeveralTeachers"]


class SeveralTeachers:
    """Asks each of them about each batch. Their shares add up to 1."""

    def __init__(self, members: tuple[tuple[float, Teaching], ...]) -> None:
        self._members = members

    def targets(self, batch: Batch) -> SeveralTargets:
        return SeveralTargets(
            tuple(
                WeightedTargets(share, teaching.shared_classes, teaching.teacher.targets(batch))
                for share, teaching in self._members
            )
        )
