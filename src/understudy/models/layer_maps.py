"""Learned linear maps from a student's hidden width to its teacher's, and the loss of what they give.

Shape letters: N supervised positions, n rows of a chunk, H the student's hidden width, Ht the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from understudy.contracts import LayerLoss

__all__ = ["CHUNK_BYTES", "LayerMaps", "first_map"]

CHUNK_BYTES = 64 * 2**20
"""Most memory that the mapped states of one chunk take in fp32; a few tensors of this size exist at once."""

ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class LayerMaps(nn.Module):
    """Trained beside a student, of which they are no part: a map without bias for each layer that has one. They are in
    checkpoints (`names.is_beside_model`), never in a model that is saved. The output of a layer without a map is
    compared as it is."""

    def __init__(self, shapes: Mapping[int, tuple[int, int]]) -> None:
        """`shapes` has (Ht, H) of each layer with a map. Parameters are on the meta device."""
        super().__init__()
        maps = {str(layer): _LayerMap(H, Ht, bias=False, device="meta") for layer, (Ht, H) in shapes.items()}
        self.projections = nn.ModuleDict(maps)

    def forward(self, outputs: dict[int, Tensor], loss: LayerLoss) -> Tensor:
        """The sum of `loss` over its terms and the supervised positions, a scalar, fp32. `outputs` has [N, H] of each
        of its layers, and is emptied. N may be 0: then it is 0 and every gradient exactly zero, never missing."""
        terms = list(enumerate(loss.layers))
        parts = []
        for layer in dict.fromkeys(loss.layers):
            hidden = outputs.pop(layer)
            for term in (term for term, own in terms if own == layer):
                if str(layer) in self.projections:
                    parts.append(self.projections[str(layer)](hidden, partial(loss, term)))
                else:
                    parts.append(_loss_of(hidden, None, partial(loss, term)))
        return torch.stack(parts).sum()


class _LayerMap(nn.Linear):
    """Needs its weight in `forward` alone, as `LossHead` does, and so works under the same hooks."""

    def forward(self, hidden: Tensor, loss: ChunkLoss) -> Tensor:  # type: ignore[override]  # nn.Linear gives its output
        return _loss_of(hidden, self.weight, loss)


def first_map(seed: int, layer: int, shape: tuple[int, int]) -> Tensor:
    """[Ht, H] fp32, which keeps the scale of what it maps: uniform, of variance 1 / H. The same on every machine, as no
    library's normal distribution is."""
    generator = np.random.default_rng([seed, layer])
    numbers = torch.from_numpy(generator.random(shape, dtype=np.float32))
    return numbers.mul_(2.0).sub_(1.0).mul_((3.0 / shape[1]) ** 0.5)


def _loss_of(hidden: Tensor, weight: Tensor | None, loss: ChunkLoss) -> Tensor:
    """`loss` of `hidden` [N, H], mapped by `weight` [Ht, H] if there is one, summed over chunks of its rows."""
    total: Tensor = _ChunkedLoss.apply(hidden, weight, loss, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return total


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward pass; the backward pass only scales them.

    Matrix products run in the compute dtype, what is compared is fp32, and the weight's gradient is summed over chunks
    in fp32. In fp16 all of it is fp32: neither sums over rows nor gradients that are yet to be scaled fit into fp16.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | None, loss: ChunkLoss, with_gradient: bool) -> Tensor:
        needs_hidden, needs_weight = (with_gradient and need for need in ctx.needs_input_grad[:2])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        dtype = wide if hidden.dtype == torch.float16 else hidden.dtype
        ctx.dtypes = hidden.dtype, None if weight is None else weight.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = None if weight is None else weight.to(dtype)
            grad_hidden = torch.empty_like(hidden, dtype=dtype) if needs_hidden else None
            grad_weight = None if weight is None or not needs_weight else torch.zeros_like(weight, dtype=wide)
            total = hidden.new_zeros((), dtype=wide)
            width = hidden.shape[1] if matrix is None else len(matrix)
            for rows in _chunks(len(hidden), CHUNK_BYTES // (4 * width)):
                own = hidden[rows].to(dtype)
                value, gradient = loss((own if matrix is None else F.linear(own, matrix)).to(wide), rows)
                total += value
                if needs_hidden or needs_weight:
                    gradient = gradient.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = gradient if matrix is None else torch.mm(gradient, matrix)
                if grad_weight is not None:
                    grad_weight += torch.mm(gradient.t(), own)
        ctx.gradients = grad_hidden, grad_weight
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden.mul_(grad_loss).to(hidden_dtype),
            None if grad_weight is None else grad_weight.mul_(grad_loss).to(weight_dtype),
            None,
            None,
        )


def _chunks(count: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
