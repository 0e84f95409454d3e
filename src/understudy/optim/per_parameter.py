"""The step shared by optimizers that update one parameter after another, in fp32."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["PerParameterOptimizer"]


class PerParameterOptimizer(torch.optim.Optimizer):
    """Calls `update` for each parameter that has a gradient. Gradients are left as they are."""

    @abstractmethod
    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Updates `parameter` and `state` in place. `grad` is fp32 and must not be written to."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("the gradient is computed before the step; a closure would compute it again.")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad.float(), self.state[parameter], group)
        return None
