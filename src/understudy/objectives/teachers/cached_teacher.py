"""A teacher that was asked before: what it said is read from the disk."""

from __future__ import annotations

from understudy.contracts import Batch
from understudy.models.head import LossHead
from understudy.objectives.targets import DenseTargets, SampledTargets, Targets, TopKTargets
from understudy.objectives.teachers.cache_contents import SampleRows, TopKRows
from understudy.objectives.teachers.cache_reader import TeacherCache
from understudy.objectives.teachers.teacher import documents_of

__all__ = ["CachedTeacher"]


class CachedTeacher:
    """Looks up each document of a batch by its tokens, whatever it stands beside. `head` is the teacher's, for a cache
    of hidden states. No collective. Raises `UserError` for a document that the cache does not have."""

    def __init__(self, cache: TeacherCache, head: LossHead | None) -> None:
        self._cache = cache
        self._head = head

    def targets(self, batch: Batch) -> Targets:
        rows, device = self._cache.batch_targets(documents_of(batch)), batch.tokens.device
        if isinstance(rows, TopKRows):
            return TopKTargets(rows.ids.to(device), rows.log_probs.to(device), rows.tail.to(device))
        if isinstance(rows, SampleRows):
            return SampledTargets(rows.ids.to(device))
        assert self._head is not None, "hidden states are nothing without their head"
        return DenseTargets.through(rows.hidden.to(device, self._head.weight.dtype), self._head)
