"""KL(p‖αp + (1−α)q): forward KL whose gradient stays bounded where the student has no mass (Ko et al., 2024,
DistiLLM)."""

from __future__ import annotations

from torch import Tensor

from understudy.objectives.divergences.log_ratio import log_mixture_ratio, log_ratio
from understudy.objectives.divergences.settings import DivergenceSettings

__all__ = ["check", "divergence"]


def check(settings: DivergenceSettings) -> None:
    settings.check_alpha()


def divergence(teacher_log: Tensor, student_log: Tensor, settings: DivergenceSettings) -> tuple[Tensor, Tensor]:
    """Σ p log p/m, m = αp + (1−α)q; derivative −(1−α)·p·q/m. See `registry.Divergence`."""
    ratio = log_ratio(teacher_log, student_log)
    mixture = log_mixture_ratio(ratio, settings.alpha)
    p = teacher_log.exp()
    value = ratio.sub_(mixture).mul_(p).sum(dim=1)
    return value, mixture.neg_().exp_().mul_(p).mul_(settings.alpha - 1.0)
