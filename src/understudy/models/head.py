"""The vocabulary head as a module that computes the loss, so that logits of a whole micro-batch never exist (P4).

Shape letters: T tokens, N supervised positions, n rows of a chunk, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from understudy.contracts import TokenLoss
from understudy.models.logits import Identity, LogitTransform

__all__ = ["CHUNK_BYTES", "LossHead"]

CHUNK_BYTES = 256 * 2**20
"""Most memory that one chunk's fp32 logits take; a few tensors of this size exist at once, whatever T and V are."""


class LossHead(nn.Linear):
    """A model's output projection. Called with a `token_loss` it gives the loss, called without it gives raw logits.

    Holds weight [V, H] and bias [V] under the names the model had, tied to its embedding or not. Works under hooks that
    gather parameters for `forward` and free them later (FSDP2, ZeRO-3): everything that needs the weight, the gradient
    included, is computed in `forward`.
    """

    transform: LogitTransform
    chunk_bytes: int

    @classmethod
    def replacing(cls, linear: nn.Linear) -> LossHead:
        """A head that owns the parameters of `linear`."""
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        head.transform = Identity()
        head.chunk_bytes = CHUNK_BYTES
        return head

    def forward(  # type: ignore[override]  # a second way to call it, beside nn.Linear's
        self, hidden: Tensor, token_loss: TokenLoss | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Without `token_loss`: `hidden` [..., H] to raw logits [..., V], which transformers' own code goes on with.

        With it: `hidden` [N, H], the supervised positions in order, to the summed loss (fp32 scalar) and the summed
        metrics. N may be 0: the loss is then 0 and every gradient exactly zero, never missing.
        """
        if token_loss is None:
            return super().forward(hidden)
        metrics: dict[str, Tensor] = {}
        work = _Work(token_loss, self.transform, self.chunk_bytes, metrics, with_gradient=torch.is_grad_enabled())
        loss: Tensor = _ChunkedLoss.apply(hidden, self.weight, self.bias, work)  # type: ignore[no-untyped-call]
        return loss, metrics

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [n, H] to the model's logits [n, V] in fp32. Goes through `__call__`, so hooks run."""
        logits, _ = self.transform(self(hidden).float(), derivative=False)
        return logits


@dataclass(frozen=True)
class _Work:
    """What the autograd function takes beside tensors; it fills `metrics`."""

    token_loss: TokenLoss
    transform: LogitTransform
    chunk_bytes: int
    metrics: dict[str, Tensor]
    with_gradient: bool


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward pass; the backward pass only scales them.

    Matrix products run in the compute dtype, logits and their gradient are fp32, and the weight's gradient is summed
    over chunks in fp32, rounded to the weight's dtype once.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> Tensor:
        dtype = _compute_dtype(hidden)
        needs_hidden, needs_weight, needs_bias = (work.with_gradient and need for need in ctx.needs_input_grad[:3])
        with_gradient = needs_hidden or needs_weight or needs_bias
        ctx.dtypes = hidden.dtype, weight.dtype

        # Autocast would cast the weight anew in each chunk, and make fp32 what is meant to be.
        with torch.autocast(hidden.device.type, enabled=False):
            rows, matrix = hidden.to(dtype), weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            grad_hidden = torch.empty_like(rows) if needs_hidden else None
            grad_weight = None
            grad_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if needs_bias else None
            loss = hidden.new_zeros((), dtype=torch.float32)

            for chunk in _chunks(len(rows), work.chunk_bytes // (4 * len(weight))):
                logits, slope = work.transform(F.linear(rows[chunk], matrix, offset).float(), with_gradient)
                result = work.token_loss(logits, chunk)
                loss += result.loss
                for name, value in result.metrics.items():
                    work.metrics[name] = work.metrics[name] + value if name in work.metrics else value
                if with_gradient:
                    grad = result.grad_logits if slope is None else result.grad_logits.mul_(slope)
                    if grad_bias is not None:
                        grad_bias += grad.sum(dim=0)
                    grad = grad.to(dtype)
                    if grad_hidden is not None:
                        torch.mm(grad, matrix, out=grad_hidden[chunk])
                    if needs_weight:
                        grad_weight = _plus_product(grad_weight, grad, rows[chunk])
                    del grad
                # Else these would live on beside the next chunk's.
                del logits, slope, result

        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the head's gradient can be taken once: its buffers are scaled in place")
        (grad_hidden, grad_weight, grad_bias), ctx.gradients = ctx.gradients, None
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden.mul_(grad_loss).to(hidden_dtype),
            None if grad_weight is None else grad_weight.mul_(grad_loss).to(weight_dtype),
            None if grad_bias is None else grad_bias.mul_(grad_loss).to(weight_dtype),
            None,
        )


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Slices that cover `count` rows, one empty slice for none: then too the token loss names its metrics."""
    size = max(1, size)
    for start in range(0, max(1, count), size):
        yield slice(start, min(start + size, count))


def _plus_product(total: Tensor | None, grad: Tensor, rows: Tensor) -> Tensor:
    """total [V, H] fp32 + gradᵀ [V, n] · rows [n, H], in place; each product is summed in fp32 inside the kernel."""
    if total is None:
        return torch.mm(grad.t(), rows).float()
    if grad.dtype == torch.float32:
        return total.addmm_(grad.t(), rows)
    return total.add_(torch.mm(grad.t(), rows))
