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
FEW = 256
"""Among so many of the likeliest classes the head's last is looked for first: to sort all of them takes several times
as long as everything else, and most teachers are sure enough most of the time."""


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
    in_head = p >= _least_in_head(p)
    gap = q.sub_(p).abs_()
    whole = gap.sum(dim=1)
    head = gap.mul_(in_head).sum(dim=1)
    return torch.where(whole > 0, head / whole, 0.5)


def _least_in_head(p: Tensor) -> Tensor:
    """[n, 1]: the probability of the head's least likely class."""
    likeliest = p.topk(min(FEW, p.shape[1]), dim=1).values
    least = _where_mass_is_reached(likeliest)
    flat = (likeliest.sum(dim=1) < HEAD_MASS).nonzero().squeeze(1)
    if len(flat):
        least[flat] = _where_mass_is_reached(p[flat].sort(dim=1, descending=True).values)
    return least


def _where_mass_is_reached(falling: Tensor) -> Tensor:
    """[n, 1]: of probabilities [n, k] in falling order, the first with which they sum to HEAD_MASS, or the last: they
    may be too few, and all of them sum to 1 only up to rounding."""
    place = (falling.cumsum(dim=1) < HEAD_MASS).sum(dim=1, keepdim=True).clamp_(max=falling.shape[1] - 1)
    return falling.gather(1, place)
