"""½ Σ |p − q|, between 0 and 1: the mass on which the two disagree (Wen et al., 2023, f-distill)."""

from __future__ import annotations

from torch import Tensor

from understudy.objectives.divergences.settings import DivergenceSettings

__all__ = ["divergence"]


def divergence(teacher_log: Tensor, student_log: Tensor, settings: DivergenceSettings) -> tuple[Tensor, Tensor]:
    """Derivative ½·q·sign(q − p), 0 where they are equal. See `registry.Divergence`."""
    q = student_log.exp()
    gap = q - teacher_log.exp()
    value = 0.5 * gap.abs().sum(dim=1)
    return value, gap.sign_().mul_(q).mul_(0.5)
