"""Attention that keeps the documents of a flat micro-batch apart, registered through transformers' attention interface.

`LanguageModel.forward` hands each layer the batch's `Documents` as a keyword, which transformers' models pass on to the
attention function. Called without it (generation, a model's own forward) the function is plain causal attention, cache
and padding mask included.

Shape letters: T tokens, L tokens of one document, Hq query heads, Hkv key and value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from understudy.devices.device import Device, DocumentAttention
from understudy.devices.documents import Documents
from understudy.errors import UserError
from understudy.models.attention_math import causal_window_mask, explicit_attention

__all__ = ["isolating_documents", "register_attention"]

Kind = Literal["auto", "sdpa", "flash", "eager"]

# transformers reads meaning into names that hold "sdpa", "flash" or "flex", so these hold none of them.
_NAMES: dict[Kind, str] = {
    "auto": "understudy_documents",
    "sdpa": "understudy_documents_fused",
    "flash": "understudy_documents_packaged",
    "eager": "understudy_documents_explicit",
}

_isolating: ContextVar[bool] = ContextVar("understudy_isolating_documents", default=False)


@contextmanager
def isolating_documents() -> Iterator[None]:
    """Inside, models build no attention mask: the attention function is told the documents instead."""
    token = _isolating.set(True)
    try:
        yield
    finally:
        _isolating.reset(token)


def register_attention(kind: Kind, device: Device) -> str:
    """Makes `kind` of attention known to transformers for `device`; returns the name for `attn_implementation`.

    `auto` is the device's variable-length kernel, and PyTorch's fused attention document by document where there is
    none or it does not support the case. `flash` raises `UserError` where the flash-attn package is not installed.
    """
    kernel = device.attention if kind == "auto" else None
    if kind == "flash":
        kernel = device.flash_attention
        if kernel is None:
            raise UserError(
                "attention: flash needs an NVIDIA GPU and the flash-attn package; "
                "run `pip install flash-attn`, or set model.attention to auto, which keeps documents apart as well."
            )
    attention = _DocumentAwareAttention(kernel, explicit=kind == "eager")
    AttentionInterface.register(_NAMES[kind], attention)
    AttentionMaskInterface.register(_NAMES[kind], _mask)
    return _NAMES[kind]


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask a model asks for, unless its documents are kept apart by the attention function itself."""
    if not _isolating.get():
        mask: Tensor | None = sdpa_mask(*args, **kwargs)
        return mask
    if kwargs.get("use_vmap"):
        raise UserError(
            "this model adds a pattern of its own to the attention mask, so it cannot be made document-aware; "
            "choose a decoder-only text model."
        )
    local_size = kwargs.get("local_size")
    if local_size is not None and getattr(kwargs["config"].get_text_config(), "sliding_window", None) != local_size:
        raise UserError(
            "this model attends in fixed chunks, so it cannot be made document-aware; choose one with full or "
            "sliding-window attention."
        )
    return None


class _DocumentAwareAttention:
    """An attention function as transformers calls it: [1, H, T, D] to [1, T, H, D] and no weights."""

    def __init__(self, kernel: DocumentAttention | None, explicit: bool) -> None:
        self.kernel = kernel
        self.explicit = explicit

    # The lengths of documents differ from batch to batch; traced, they would recompile each layer for each of them.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        documents: Documents | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        explicit = self.explicit or softcap is not None or s_aux is not None
        if documents is None:
            causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
            output = _plain(query, key, value, attention_mask, position_bias, dropout, scale, softcap, s_aux, causal, explicit)
            return output.transpose(1, 2).contiguous(), None

        _refuse_what_documents_cannot_have(module, attention_mask, position_bias, is_causal)
        kernel = self.kernel
        if kernel is not None and s_aux is None and key.shape[-1] == value.shape[-1]:
            if kernel.supports(query.dtype, query.shape[-1], dropout, softcap):
                flat = (tensor.squeeze(0).transpose(0, 1).contiguous() for tensor in (query, key, value))
                output = kernel(*flat, documents, scale=scale, window=sliding_window, dropout=dropout, softcap=softcap)
                return output.unsqueeze(0), None

        outputs = []
        for q, k, v in zip(*(tensor.split(documents.lengths, dim=2) for tensor in (query, key, value))):
            if explicit:
                mask = causal_window_mask(q.shape[2], sliding_window, q.device)
                part = explicit_attention(q, k, v, mask, scale, dropout, softcap, s_aux)
            else:
                part = _fused(q, k, v, sliding_window, scale, dropout)
            outputs.append(part.transpose(1, 2))
        return torch.cat(outputs, dim=1), None


def _refuse_what_documents_cannot_have(
    module: nn.Module, mask: Tensor | None, position_bias: Tensor | None, is_causal: bool | None
) -> None:
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if mask is not None or position_bias is not None or not causal:
        what = "a mask" if mask is not None else "position biases" if position_bias is not None else "no causal order"
        raise UserError(
            f"{type(module).__name__} attends with {what} of its own, so it cannot be made document-aware; "
            "choose a model whose attention goes through transformers' attention interface."
        )


def _fused(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float, dropout: float) -> Tensor:
    """PyTorch's scaled dot-product attention over one document. A sliding window goes through it in bands of `window`
    queries, which see at most twice as many keys, so that memory grows with L · window and not with L²."""
    length = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )
    bands = []
    for start in range(0, length, window):
        end, first = min(start + window, length), max(0, start - window + 1)
        mask = causal_window_mask(end - first, window, query.device)[start - first :]
        bands.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, first:end],
                value[:, :, first:end],
                attn_mask=mask,
                dropout_p=dropout,
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(bands, dim=2)


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    position_bias: Tensor | None,
    dropout: float,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    causal: bool,
    explicit: bool,
) -> Tensor:
    """Attention as transformers' own: `mask` is boolean [B, 1, Q, K], or None for causal over all or the last Q keys."""
    if mask is None and causal and query.shape[2] > 1:
        mask = causal_window_mask(key.shape[2], None, query.device)[-query.shape[2] :]
    if explicit:
        return explicit_attention(query, key, value, mask, scale, dropout, softcap, sinks, position_bias)
    if position_bias is not None:
        mask = position_bias if mask is None else position_bias.masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
