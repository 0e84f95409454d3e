"""Variable-length flash attention kernels: PyTorch's own and the flash-attn package's. Not yet verified on a device."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from understudy.devices.documents import Documents

__all__ = ["FlashAttention", "VariableLengthAttention"]

_HALF = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256


class VariableLengthAttention:
    """`torch.nn.attention.varlen.varlen_attn` (torch ≥ 2.10). Not yet verified on a device."""

    def supports(self, dtype: torch.dtype, head_size: int, dropout: float, softcap: float | None) -> bool:
        return dtype in _HALF and head_size <= _LARGEST_HEAD and dropout == 0.0 and softcap is None

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Documents,
        *,
        scale: float,
        window: int | None,
        dropout: float,
        softcap: float | None,
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        output: Tensor = varlen_attn(
            query,
            key,
            value,
            documents.offsets,
            documents.offsets,
            documents.longest,
            documents.longest,
            scale=scale,
            # (left, right) tokens seen beside the token itself; −1 is all of them.
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output


class FlashAttention:
    """`flash_attn.flash_attn_varlen_func` (Dao, arXiv:2307.08691). Not yet verified on a device."""

    @staticmethod
    def installed() -> bool:
        return find_spec("flash_attn") is not None

    def supports(self, dtype: torch.dtype, head_size: int, dropout: float, softcap: float | None) -> bool:
        return dtype in _HALF and head_size <= _LARGEST_HEAD

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Documents,
        *,
        scale: float,
        window: int | None,
        dropout: float,
        softcap: float | None,
    ) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        output: Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            documents.offsets,
            documents.offsets,
            documents.longest,
            documents.longest,
            dropout_p=dropout,
            softmax_scale=scale,
            causal=True,
            window_size=(-1 if window is None else window - 1, 0),
            softcap=softcap or 0.0,
        )
        return output
