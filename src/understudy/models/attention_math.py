"""Attention written out, for what fused kernels leave out: soft-capped scores and attention sinks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["causal_window_mask", "explicit_attention"]


def causal_window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """[L, L] bool: query i sees keys i − window + 1 … i, or all up to i."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None or window >= length else mask.triu(1 - window)


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """softmax(softcap(scale · q kᵀ)) v with the softmax in fp32: `query` [B, Hq, Q, D], `key` and `value` [B, Hkv, K, D]
    to [B, Hq, Q, D].

    `mask` is boolean and broadcast over [B, Hq, Q, K]; `sinks` [Hq] are scores of one more key, whose value is zero.
    """
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor for tensor in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(batch, heads, length, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(F.dropout(weights, p=dropout), value)
