"""Divergences as their papers write them, for autograd in fp64: the reference that the real ones are compared with.

Log-probabilities p (teacher) and q (student) [n, C] to values [n]; no class may have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

KINDS = [
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "adaptive_kl",
]


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(1)


def mixture(p: Tensor, q: Tensor, share: float) -> Tensor:
    return (share * p.exp() + (1 - share) * q.exp()).log()


def adaptive_kl(p: Tensor, q: Tensor) -> Tensor:
    values = []
    for p_row, q_row in zip(p, q):
        gap = (p_row.exp() - q_row.exp()).abs().detach()
        head, mass = [], 0.0
        for c in p_row.argsort(descending=True, stable=True).tolist():
            if mass >= 0.5:
                break
            head.append(c)
            mass += p_row[c].exp().item()
        weight = gap[head].sum() / gap.sum() if gap.sum() > 0 else torch.tensor(0.5, dtype=p.dtype)
        forward, reverse = kl(p_row[None], q_row[None]), kl(q_row[None], p_row[None])
        values.append(weight * forward + (1 - weight) * reverse)
    return torch.cat(values)


def universal_distance(p: Tensor, q: Tensor, matched: Sequence[tuple[int, int]]) -> Tensor:
    """Of one row's probabilities p [Ct] and q [Cs], whose classes are the same where `matched` pairs q's and p's."""
    total = sum((abs(p[theirs] - q[ours]) for ours, theirs in matched), p.new_zeros(()))
    left_p = [p[i] for i in range(len(p)) if i not in {theirs for _, theirs in matched}]
    left_q = [q[i] for i in range(len(q)) if i not in {ours for ours, _ in matched}]
    zeros = [p.new_zeros(())] * max(len(left_p), len(left_q))
    falling = [sorted(left + zeros, key=lambda value: value.item(), reverse=True) for left in (left_p, left_q)]
    return (total + sum(abs(a - b) for a, b in zip(*falling))) / 2


def formula(kind: str, alpha: float = 0.1, beta: float = 0.5) -> Callable[[Tensor, Tensor], Tensor]:
    return {
        "forward_kl": kl,
        "reverse_kl": lambda p, q: kl(q, p),
        "jsd": lambda p, q: beta * kl(p, mixture(p, q, beta)) + (1 - beta) * kl(q, mixture(p, q, beta)),
        "skew_forward_kl": lambda p, q: kl(p, mixture(p, q, alpha)),
        "skew_reverse_kl": lambda p, q: kl(q, mixture(p, q, 1 - alpha)),
        "total_variation": lambda p, q: 0.5 * (p.exp() - q.exp()).abs().sum(1),
        "adaptive_kl": adaptive_kl,
    }[kind]
