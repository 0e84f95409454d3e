"""KL(p‖q), teacher against student: the student covers all that the teacher might say (Hinton et al., 2015)."""

from __future__ import annotations

from torch import Tensor

from understudy.objectives.divergences.log_ratio import log_ratio
from understudy.objectives.divergences.settings import DivergenceSettings

__all__ = ["divergence"]


def divergence(teacher_log: Tensor, student_log: Tensor, settings: DivergenceSettings) -> tuple[Tensor, Tensor]:
    """Σ p log p/q; derivative −p. See `registry.Divergence`."""
    p = teacher_log.exp()
    value = log_ratio(teacher_log, student_log).mul_(p).sum(dim=1)
    return value, p.neg_()
