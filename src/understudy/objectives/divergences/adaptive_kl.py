"""A convex mix of forward and reverse KL, weighted by where the two distributions differ (Wu et al., 2024, "Rethinking
Kullback-Leibler divergence in knowledge distillation for large language models")."""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.objectives.divergences import forward_kl, reverse_kl
from understudy.objectives.divergences.settings import DivergenceSettings

__all__ = ["divergence"]

HEAD_MASS = 0.5
"""The teacher's likeliest classes that have this mass together are its head, the others its tail: the paper's μ."""


def divergence(teacher_log: Tensor, student_log: Tensor, settings: DivergenceSettings) -> tuple[Tensor, Tensor]:
    """w·KL(p‖q) + (1 − w)·KL(q‖p) with w = Σ_head |p − q| ÷ Σ |p − q|, a constant for the derivative; ½ where p = q.

    Classes as likely as the head's least likely one all belong to the head. See `registry.Divergence`.
    """
    weight = _head_share(teacher_log.exp(), student_log.exp()).unsqueeze(1)
    forward_value, forward_derivative = forward_kl.divergence(teacher_log, student_log, settings)
    reverse_value, reverse_derivative = reverse_kl.divergence(teacher_log, student_log, settings)
    value = torch.lerp(reverse_value, forward_value, weight.squeeze(1))
    return value, reverse_derivative.lerp_(forward_derivative, weight)


def _head_share(p: Tensor, q: Tensor) -> Tensor:
    """[n]: the head's share of Σ |p − q|."""
    likeliest_first = p.sort(dim=1, descending=True).values
    # The head ends at the first class with which it has the mass; p sums to 1 only up to rounding, hence the clamp.
    last = (likeliest_first.cumsum(dim=1) < HEAD_MASS).sum(dim=1, keepdim=True).clamp_(max=p.shape[1] - 1)
    in_head = p >= likeliest_first.gather(1, last)
    gap = q.sub_(p).abs_()
    whole = gap.sum(dim=1)
    head = gap.mul_(in_head).sum(dim=1)
    return torch.where(whole > 0, head / whole, 0.5)
