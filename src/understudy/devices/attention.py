"""What a kernel for attention inside the documents of a flat micro-batch is told and must compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["AttentionRule", "DocumentAttention", "Documents"]


@dataclass(frozen=True)
class Documents:
    """Where the documents lie. Made once a micro-batch and handed to every layer; reading it never waits for the
    device."""

    lengths: tuple[int, ...]
    """Tokens of each document, in order."""
    offsets: Tensor
    """[D+1] int32 on the device that computes, first 0, last T."""
    longest: int
    """Tokens of the longest document."""

    @staticmethod
    def of(document_offsets: Tensor, device: torch.device) -> Documents:
        """From a batch's `document_offsets` [D+1] int32 on the CPU."""
        lengths = tuple(document_offsets.diff().tolist())
        return Documents(lengths, document_offsets.to(device, non_blocking=True), max(lengths))


@dataclass(frozen=True)
class AttentionRule:
    """softmax(softcap · tanh(scale · q kᵀ / softcap)) v, over the keys that a query sees."""

    scale: float
    window: int | None = None
    """A token sees itself and at most `window` − 1 tokens before it; None is all of them."""
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None
    """[Hq] scores of one more key whose value is zero (Xiao et al., arXiv:2309.17453)."""


class DocumentAttention(Protocol):
    """A kernel for causal attention inside each document, gradients included."""

    def supports(self, query: Tensor, value: Tensor, rule: AttentionRule) -> bool:
        """Whether `__call__` computes exactly this. Where it does not, a slower way that does is taken."""
        ...

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, rule: AttentionRule) -> Tensor:
        """`query` [T, Hq, D], `key` and `value` [T, Hkv, D] to [T, Hq, D]."""
        ...
