"""What an optimizer keeps of a parameter, in the form in which a checkpoint holds it."""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

__all__ = ["KeepsOwnForm", "Kept", "kept_state", "restore_state"]

Kept = dict[str, Tensor]
"""State by key. Elementwise tensors have the parameter's shape (that of its local part where it is sharded), counts are
scalars; anything else belongs to the whole parameter."""


@runtime_checkable
class KeepsOwnForm(Protocol):
    """An optimizer whose `state` is not what a checkpoint should hold."""

    def kept_state(self, parameter: Tensor) -> Kept: ...

    def restore_state(self, parameter: Tensor, kept: Kept) -> None: ...


def kept_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Kept:
    """The state of `parameter`, by reference where it can be; empty before its first update."""
    if isinstance(optimizer, KeepsOwnForm):
        return optimizer.kept_state(parameter)
    state = cast(dict[str, Any], optimizer.state.get(parameter, {}))
    return {key: _count(value) if key == "step" else value for key, value in state.items()}


def restore_state(optimizer: torch.optim.Optimizer, parameter: Tensor, kept: Kept) -> None:
    """Makes `kept` the state of `parameter`: the next update is the one that would have followed."""
    if isinstance(optimizer, KeepsOwnForm):
        optimizer.restore_state(parameter, kept)
        return
    optimizer.state[parameter] = {
        key: _as_counted(optimizer, parameter, value) if key == "step" else value for key, value in kept.items()
    }


def _count(step: Any) -> Tensor:
    """Counts are fp32 scalars, as PyTorch's own optimizers have them; exact up to 2^24 updates."""
    return torch.as_tensor(step, dtype=torch.float32).detach().cpu()


def _as_counted(optimizer: torch.optim.Optimizer, parameter: Tensor, step: Tensor) -> Tensor:
    """PyTorch's fused kernels read the count on the device, the others on the host."""
    return step.to(parameter.device) if optimizer.defaults.get("fused") else step.clone()
