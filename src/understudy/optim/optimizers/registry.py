"""Finds an optimizer by its name: `optimizers/<kind>.py`, whose `make` builds it. A new file is a new optimizer."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import torch
from torch import nn

from understudy.recipe.schema import Optimizer

__all__ = ["make_optimizer"]


class Make(Protocol):
    """What a module of this folder offers under the name `make`."""

    def __call__(
        self, optimizer: Optimizer, named_parameters: Sequence[tuple[str, nn.Parameter]], *, fused: bool
    ) -> torch.optim.Optimizer: ...


def make_optimizer(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]], *, fused: bool
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters, by their canonical names, plain or FSDP2 DTensors.

    `fused` is whether the device has fused optimizer kernels (`Device`); an optimizer without one ignores it. Every
    group takes its learning rate from `group["lr"]` at each step; a group's own scale is applied on top. Raises
    `UserError` when a package that the optimizer needs is not installed. No collective.
    """
    module = importlib.import_module(f"understudy.optim.optimizers.{optimizer.kind}")
    return cast(Make, module.make)(optimizer, list(named_parameters), fused=fused)
