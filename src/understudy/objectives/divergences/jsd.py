"""Generalised Jensen-Shannon divergence (Agarwal et al., 2024, GKD): β·KL(p‖m) + (1−β)·KL(q‖m), m = βp + (1−β)q."""

from __future__ import annotations

from torch import Tensor

from understudy.errors import UserError
from understudy.objectives.divergences.log_ratio import log_mixture_ratio, log_ratio
from understudy.objectives.divergences.settings import DivergenceSettings

__all__ = ["check", "divergence"]


def check(settings: DivergenceSettings) -> None:
    """Raises `UserError` unless 0 < beta < 1: it is 0 at both ends, and what it tends to there, divided by β or 1 − β,
    are the two KLs."""
    if settings.beta in (0.0, 1.0):
        limit = "forward_kl" if settings.beta == 0.0 else "reverse_kl"
        raise UserError(f"jsd is zero at beta = {settings.beta:g}: for its limit there write divergence: {limit}")
    if not 0.0 < settings.beta < 1.0:
        raise UserError(f"jsd needs 0 < beta < 1, not {settings.beta:g}: write beta = 0.5, say")


def divergence(teacher_log: Tensor, student_log: Tensor, settings: DivergenceSettings) -> tuple[Tensor, Tensor]:
    """Derivative (1−β)·q·log q/m: what comes through m cancels. See `registry.Divergence`."""
    beta = settings.beta
    ratio = log_ratio(teacher_log, student_log)
    mixture = log_mixture_ratio(ratio, beta)
    teacher_part = ratio.sub_(mixture).mul_(teacher_log.exp()).sum(dim=1)
    derivative = mixture.mul_(student_log.exp()).mul_(beta - 1.0)
    return beta * teacher_part + derivative.sum(dim=1), derivative
