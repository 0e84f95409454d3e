"""The precision contract (design §6): which dtype holds weights and which computes, the same under every strategy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Precision", "compute_in", "precision_of"]


@dataclass(frozen=True)
class Precision:
    weights: torch.dtype
    """Master weights, moments and gradient accumulation."""
    compute: torch.dtype
    """Forward and backward, and weights that are not trained, which need no master."""
    loss_scaling: bool = False
    """Gradients would underflow in `compute` without a scale."""

    def held_in(self, parameter: nn.Parameter) -> torch.dtype:
        """The dtype in which the values of `parameter` are kept."""
        return self.weights if parameter.requires_grad else self.compute


_PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.float32, torch.bfloat16),
    "fp16": Precision(torch.float32, torch.float16, loss_scaling=True),
    "pure_bf16": Precision(torch.bfloat16, torch.bfloat16),
}


def precision_of(name: str) -> Precision:
    """The contract behind `training.precision`, `auto` resolved."""
    return _PRECISIONS[name]


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Makes `module` compute in `dtype` while its parameters, and the gradients they get, keep their own.

    Each use of a weight casts it anew, through PyTorch's parametrization, so recomputation under activation
    checkpointing casts again and keeps nothing. Unlike autocast this also holds the residual stream in `dtype`, which
    is what FSDP2's and DeepSpeed's mixed precision do. Parameters' names gain a suffix that `canonical_name` removes.
    """
    for child in list(module.modules()):
        for name, parameter in list(child.named_parameters(recurse=False)):
            if parameter.dtype != dtype and parameter.is_floating_point():
                # `unsafe` skips a trial run that demands the dtype be kept.
                parametrize.register_parametrization(child, name, _Cast(dtype), unsafe=True)
