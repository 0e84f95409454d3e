"""Variable-length flash attention kernels: PyTorch's own and the flash-attn package's. Not yet verified on a device."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from understudy.devices.attention import AttentionRule, Documents

__all__ = ["FlashAttention", "VariableLengthAttention"]

_LARGEST_HEAD = 256


def _fits(query: Tensor, value: Tensor) -> bool:
    """The kernels are for half precision on Ampere (compute capability 8.0) or newer."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    recent = query.is_cuda and torch.cuda.get_device_capability(query.device)[0] >= 8
    return half and recent and query.shape[-1] == value.shape[-1] <= _LARGEST_HEAD


def _window(rule: AttentionRule) -> tuple[int, int]:
    """(left, right) tokens seen beside the token itself; −1 is all of them."""
    return (-1 if rule.window is None else rule.window - 1, 0)


class VariableLengthAttention:
    """`torch.nn.attention.varlen.varlen_attn` (torch ≥ 2.10). Not yet verified on a device."""

    def supports(self, query: Tensor, value: Tensor, rule: AttentionRule) -> bool:
        return _fits(query, value) and rule.dropout == 0.0 and rule.softcap is None and rule.sinks is None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, rule: AttentionRule) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        offsets, longest = documents.offsets, documents.longest
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            # Grouped heads became an argument only after torch 2.10; repeating them is right with every version.
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        output = varlen_attn(
            query, key, value, offsets, offsets, longest, longest, scale=rule.scale, window_size=_window(rule)
        )
        assert isinstance(output, Tensor), "a pair comes only with return_aux"
        return output


class FlashAttention:
    """`flash_attn.flash_attn_varlen_func` (Dao, arXiv:2307.08691). Not yet verified on a device."""

    @staticmethod
    def installed() -> bool:
        return find_spec("flash_attn") is not None

    def supports(self, query: Tensor, value: Tensor, rule: AttentionRule) -> bool:
        return _fits(query, value) and rule.sinks is None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, rule: AttentionRule) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        offsets, longest = documents.offsets, documents.longest
        output: Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            offsets,
            offsets,
            longest,
            longest,
            dropout_p=rule.dropout,
            softmax_scale=rule.scale,
            causal=True,
            window_size=_window(rule),
            softcap=rule.softcap or 0.0,
        )
        return output
