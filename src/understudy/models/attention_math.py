"""Attention inside one document, by PyTorch's fused kernels where they can and written out where they cannot.

Shape letters: L tokens of one document, Q queries, K keys, Hq query heads, Hkv key and value heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.devices.attention import AttentionRule

__all__ = ["causal_window_mask", "explicit_attention", "fused_attention"]


def causal_window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """[L, L] bool: query i sees keys i − window + 1 … i, or all up to i."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None or window >= length else mask.triu(1 - window)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
    """Scaled dot-product attention over one document, [1, H, L, D]. A sliding window goes through it in bands of
    `window` queries, which see at most twice as many keys, so that memory grows with L · window and not with L²."""
    length, window = query.shape[2], rule.window
    grouped = query.shape[1] != key.shape[1]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=rule.dropout, is_causal=True, scale=rule.scale, enable_gqa=grouped
        )
    bands = []
    for start in range(0, length, window):
        end, first = min(start + window, length), max(0, start - window + 1)
        bands.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, first:end],
                value[:, :, first:end],
                attn_mask=causal_window_mask(end - first, window, query.device)[start - first :],
                dropout_p=rule.dropout,
                scale=rule.scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(bands, dim=2)


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: AttentionRule) -> Tensor:
    """What `rule` says but its window, with the softmax in fp32.

    `query` [B, Hq, Q, D], `key` and `value` [B, Hkv, K, D] to [B, Hq, Q, D]. `mask` is boolean, true where a query sees
    a key, and broadcast over [B, Hq, Q, K].
    """
    batch, heads, queries, _ = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * rule.scale
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if rule.sinks is not None:
        sinks = rule.sinks.to(scores.dtype).reshape(1, heads, 1, 1).expand(batch, heads, queries, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if rule.sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(F.dropout(weights, p=rule.dropout), value)
