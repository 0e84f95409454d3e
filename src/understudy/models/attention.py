"""Attention that keeps the documents of a flat micro-batch apart, registered through transformers' attention interface.

`LanguageModel.forward` hands each layer the batch's `Documents` as a keyword, which transformers' models pass on to the
attention function. Called without it (generation, a model's own forward) the function is plain causal attention, cache
and padding mask included.

Shape letters: B sequences (1 with documents), H heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from understudy.devices.attention import AttentionRule, DocumentAttention, Documents
from understudy.devices.device import Device
from understudy.errors import UserError
from understudy.models.attention_math import causal_window_mask, explicit_attention, fused_attention

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
                "run `pip install flash-attn`, or set model.attention to auto, which keeps documents apart as well.",
                key="model.attention",
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
    """An attention function as transformers calls it: [B, H, T, D] to [B, T, H, D] and no weights."""

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
        documents: Documents | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rule = AttentionRule(scale, sliding_window, dropout, softcap, s_aux)
        if documents is None:
            return _plain(module, query, key, value, attention_mask, rule, others), None
        _refuse_what_documents_cannot_have(module, attention_mask, others)
        if self.kernel is not None and self.kernel.supports(query, value, rule):
            q, k, v = (tensor.squeeze(0).transpose(0, 1).contiguous() for tensor in (query, key, value))
            return self.kernel(q, k, v, documents, rule).unsqueeze(0), None
        return self._document_by_document(query, key, value, documents, rule), None

    def _document_by_document(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, rule: AttentionRule
    ) -> Tensor:
        outputs = []
        split = (torch.split(tensor, list(documents.lengths), dim=2) for tensor in (query, key, value))
        for q, k, v in zip(*split):
            if self.explicit or _needs_explicit(rule):
                output = explicit_attention(q, k, v, causal_window_mask(q.shape[2], rule.window, q.device), rule)
            else:
                output = fused_attention(q, k, v, rule)
            outputs.append(output.transpose(1, 2))
        return torch.cat(outputs, dim=1)


def _needs_explicit(rule: AttentionRule) -> bool:
    return rule.softcap is not None or rule.sinks is not None


def _refuse_what_documents_cannot_have(module: nn.Module, mask: Tensor | None, others: dict[str, Any]) -> None:
    causal = others.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if mask is not None or others.get("position_bias") is not None or not causal:
        raise UserError(
            f"{type(module).__name__} attends by a mask, position biases or an order of its own, so it cannot be made "
            "document-aware; choose another architecture."
        )


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rule: AttentionRule,
    others: dict[str, Any],
) -> Tensor:
    """Attention without documents, as transformers' own: `mask` is boolean, None where order alone decides."""
    if not _needs_explicit(rule):
        output: Tensor = sdpa_attention_forward(
            module, query, key, value, mask, dropout=rule.dropout, scaling=rule.scale, **others
        )[0]
        return output
    if mask is None and query.shape[2] > 1:
        mask = causal_window_mask(key.shape[2], rule.window, query.device)[-query.shape[2] :]
    return explicit_attention(query, key, value, mask, rule).transpose(1, 2).contiguous()
