"""Universal logit distance (Boizard et al., 2024): compares how probabilities are spread, not which class has which, so
teacher and student may have different vocabularies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["distance"]


def distance(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """½ Σ_i |p_(i) − q_(i)| over probabilities in falling order, the shorter list padded with zeros: between 0 and 1.

    `teacher` [n, Vt] and `student` [n, Vs] are probabilities, fp32 or fp64. Gives [n] and the derivative [n, Vs] with
    respect to `student`, which each class gets by its place in the order. The paper's sum has no factor ½.
    """
    p = teacher.sort(dim=1, descending=True).values
    q, order = student.sort(dim=1, descending=True, stable=True)
    shared, width = min(p.shape[1], q.shape[1]), q.shape[1]
    # What p has beyond the student's classes meets zeros that have no gradient.
    beyond = p[:, shared:].sum(dim=1)
    gap = q.sub_(F.pad(p[:, :shared], (0, width - shared)))
    value = 0.5 * (gap.abs().sum(dim=1) + beyond)
    return value, torch.empty_like(student).scatter_(1, order, gap.sign_().mul_(0.5))
