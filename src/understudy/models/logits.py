"""What an architecture makes of its head's output before calling it logits: nothing, a scale or a cap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Identity", "LogitTransform", "Scale", "SoftCap", "candidate_transforms"]


class LogitTransform(Protocol):
    def __call__(self, raw: Tensor, derivative: bool) -> tuple[Tensor, Tensor | float | None]:
        """Logits of `raw` (fp32, may be overwritten) and, where asked for, their elementwise derivative; None is 1."""
        ...


@dataclass(frozen=True)
class Identity:
    """Logits are what the head gives."""

    def __call__(self, raw: Tensor, derivative: bool) -> tuple[Tensor, Tensor | float | None]:
        return raw, None


@dataclass(frozen=True)
class Scale:
    """logits = factor · raw (Cohere's `logit_scale`; Granite divides by `logits_scaling`)."""

    factor: float

    def __call__(self, raw: Tensor, derivative: bool) -> tuple[Tensor, Tensor | float | None]:
        return raw.mul_(self.factor), self.factor


@dataclass(frozen=True)
class SoftCap:
    """logits = cap · tanh(raw / cap), with derivative 1 − (logits / cap)² (Gemma 2, arXiv:2408.00118, section 2)."""

    cap: float

    def __call__(self, raw: Tensor, derivative: bool) -> tuple[Tensor, Tensor | float | None]:
        bounded = raw.div_(self.cap).tanh_()
        slope = (bounded * bounded).neg_().add_(1.0) if derivative else None
        return bounded.mul_(self.cap), slope


def candidate_transforms(config: Any) -> Iterator[LogitTransform]:
    """What the fields of a model's configuration may mean. The same field multiplies in one architecture and divides in
    another, so `models.probe` tries each against the architecture's own logits."""
    yield Identity()
    if cap := getattr(config, "final_logit_softcapping", None):
        yield SoftCap(float(cap))
    for field in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if factor := getattr(config, field, None):
            yield Scale(float(factor))
            yield Scale(1.0 / float(factor))
