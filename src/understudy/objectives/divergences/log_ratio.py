"""What all divergences are made of: log p/q, and log m/q of a mixture m of both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ABSENT", "log_mixture_ratio", "log_or_minus_infinity", "log_ratio"]

ABSENT = 24 * math.log(2)
"""|log p/q|, in nats, where only one of the two has a class at all: a mass of 2^-24 is what a sum of fp32 probabilities
cannot tell from none. Infinite otherwise: a cached tail rounded to nothing would stop a run under reverse KL."""


def log_ratio(teacher_log: Tensor, student_log: Tensor) -> Tensor:
    """log p/q [n, C], always finite: 0 for a class that neither has, ±ABSENT for one that only one has."""
    return (teacher_log - student_log).nan_to_num_(nan=0.0, posinf=ABSENT, neginf=-ABSENT)


def log_mixture_ratio(ratio: Tensor, teacher_share: float) -> Tensor:
    """log m/q [n, C] for m = share·p + (1 − share)·q, from `ratio` = log p/q.

    Relative to q, as its rounding error is that of a ratio near 1. That of log m itself, some 12 nats from 0 at large
    vocabularies, makes divergences of equal distributions visibly negative.
    """
    student_share = ratio.new_tensor(log_or_minus_infinity(1.0 - teacher_share))
    return torch.logaddexp(ratio + log_or_minus_infinity(teacher_share), student_share)


def log_or_minus_infinity(share: float) -> float:
    return math.log(share) if share > 0.0 else -math.inf
