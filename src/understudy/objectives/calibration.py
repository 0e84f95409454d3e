"""Whether a model is right as often as it is sure (Guo et al., 2017, "On calibration of modern neural networks")."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BINS", "calibration_error", "calibration_gaps"]

BINS = 15
"""Of equal width, as in the paper."""


def calibration_gaps(confidence: Tensor, correct: Tensor) -> Tensor:
    """[BINS] fp32: for each bin of `confidence` [n], the number of `correct` [n] bool less the sum of confidences. Sums
    over tokens, so that parts may be added up."""
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    members = bins.unsqueeze(1) == torch.arange(BINS, device=bins.device)
    gaps = (correct.float() - confidence.float()).unsqueeze(1)
    return torch.where(members, gaps, 0.0).sum(dim=0)


def calibration_error(gaps: Tensor, count: float) -> float:
    """The expected calibration error of `count` tokens, between 0 and 1, from the sums over all of them."""
    return float(gaps.double().abs().sum()) / count
