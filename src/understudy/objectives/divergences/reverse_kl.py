"""KL(q‖p), student against teacher: the student keeps to what the teacher finds likely (Gu et al., 2024, MiniLLM)."""

from __future__ import annotations

from torch import Tensor

from understudy.objectives.divergences.log_ratio import log_ratio
from understudy.objectives.divergences.settings import DivergenceSettings

__all__ = ["divergence"]


def divergence(teacher_log: Tensor, student_log: Tensor, settings: DivergenceSettings) -> tuple[Tensor, Tensor]:
    """Σ q log q/p; derivative q·(log q/p + 1). See `registry.Divergence`."""
    q = student_log.exp()
    terms = log_ratio(teacher_log, student_log).neg_().mul_(q)
    return terms.sum(dim=1), q.add_(terms)
