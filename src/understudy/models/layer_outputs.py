"""What decoder layers put out at some positions, taken while the model computes, so that nothing else of it is kept.

Shape letters: T tokens, n positions, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["collecting_outputs"]


@contextmanager
def collecting_outputs(layers: Mapping[int, nn.Module], rows: Tensor) -> Iterator[dict[int, Tensor]]:
    """While inside, each of `layers`, as it computes [1, T, H], leaves its output at `rows` [n] int64 under its number:
    [n, H]. One that is computed again, for a backward pass, leaves nothing: that is outside."""
    numbers = {layer: number for number, layer in layers.items()}
    outputs: dict[int, Tensor] = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled layer would be compiled anew for each hook
    def take(layer: nn.Module, _: Any, output: Any) -> None:
        whole = output[0] if isinstance(output, tuple) else output
        outputs[numbers[layer]] = _Rows.apply(whole, rows)  # type: ignore[no-untyped-call]

    hooks = [layer.register_forward_hook(take) for layer in layers.values()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


class _Rows(torch.autograd.Function):
    """`index_select` that saves no tensor for the backward pass. Where hooks are part of what activation checkpointing
    computes again, as in transformers 5.5, it would then miss that tensor."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, rows: Tensor) -> Tensor:
        ctx.rows, ctx.shape = rows, output.shape
        return output.index_select(1, rows).squeeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.new_zeros(ctx.shape)
        whole[0].index_copy_(0, ctx.rows, gradient)
        return whole, None
