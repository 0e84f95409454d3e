"""KL(q‖(1−α)p + αq): reverse KL that stays bounded where the teacher has no mass (Ko et al., 2024, DistiLLM)."""

from __future__ import annotations

from torch import Tensor

from understudy.objectives.divergences.log_ratio import log_mixture_ratio, log_or_minus_infinity, log_ratio
from understudy.objectives.divergences.settings import DivergenceSettings

__all__ = ["check", "divergence"]


def check(settings: DivergenceSettings) -> None:
    settings.check_alpha()


def divergence(teacher_log: Tensor, student_log: Tensor, settings: DivergenceSettings) -> tuple[Tensor, Tensor]:
    """Σ q log q/m, m = (1−α)p + αq; derivative q·(log q/m + 1 − α·q/m). See `registry.Divergence`."""
    mixture = log_mixture_ratio(log_ratio(teacher_log, student_log), 1.0 - settings.alpha)
    q = student_log.exp()
    # q/m alone may overflow at α = 0; α·q/m never exceeds 1.
    own_part = mixture.neg().add_(log_or_minus_infinity(settings.alpha)).exp_().mul_(q)
    terms = mixture.neg_().mul_(q)
    return terms.sum(dim=1), q.add_(terms).sub_(own_part)
