"""Adafactor (Shazeer & Stern, 2018): second moments factored into rows and columns, so nearly no optimizer memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from understudy.optim.groups import decay_groups
from understudy.optim.per_parameter import PerParameterOptimizer
from understudy.optim.shards import replicated
from understudy.recipe.schema import Optimizer

__all__ = ["Adafactor", "make"]

_SMALLEST_SCALE = 1e-3
_SMALLEST_VARIANCE = 1e-30


def make(
    optimizer: Optimizer, named_parameters: Sequence[tuple[str, nn.Parameter]], *, fused: bool
) -> torch.optim.Optimizer:
    return Adafactor(decay_groups(named_parameters, optimizer), lr=optimizer.learning_rate)


class Adafactor(PerParameterOptimizer):
    """Without momentum, with update clipping at 1 and a learning rate relative to each parameter's root mean square,
    as in the paper's algorithms 4 and 5; weight decay is decoupled.

    Rows, columns and root mean squares are those of the whole parameter, also when it is sharded (a collective then;
    PyTorch's own Adafactor fails on DTensors, as of 2.13). All arithmetic is fp32, and so is the state.
    """

    def __init__(self, params: list[dict[str, Any]], *, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        state["step"] = state.get("step", torch.tensor(0.0)) + 1
        step = state["step"].item()
        weight = parameter.float()
        # 1 - the paper's second beta, which grows with the step; 1 at the first, so that no bias is there to correct.
        share = step**-0.8
        update = grad * self._variance(state, grad * grad + _SMALLEST_VARIANCE, share).rsqrt()
        update = update / _root_mean_square(update).clamp(min=1.0)
        relative = min(group["lr"], 1 / math.sqrt(step))
        scale = _root_mean_square(weight).clamp(min=_SMALLEST_SCALE) * relative
        parameter.copy_(weight * (1 - group["lr"] * group["weight_decay"]) - update * scale)

    @staticmethod
    def _variance(state: dict[str, Tensor], square: Tensor, share: float) -> Tensor:
        if square.ndim < 2:
            state["variance"] = _moved(state.get("variance"), square, share)
            return state["variance"]
        # Sums divided by the count: the mean of means of unequal shards would be another number.
        rows = square.sum(-1, keepdim=True) / square.shape[-1]
        columns = replicated(square.sum(-2, keepdim=True)) / square.shape[-2]
        state["row_var"] = _moved(state.get("row_var"), rows, share)
        state["col_var"] = _moved(state.get("col_var"), columns, share)
        mean = replicated(state["row_var"].sum(-2, keepdim=True)) / square.shape[-2]
        return state["row_var"] * (state["col_var"] / mean)


def _moved(average: Tensor | None, value: Tensor, share: float) -> Tensor:
    return value if average is None else torch.lerp(average, value, share)


def _root_mean_square(tensor: Tensor) -> Tensor:
    """Scalar, over the whole tensor."""
    return (replicated((tensor * tensor).sum()) / tensor.numel()).sqrt()
