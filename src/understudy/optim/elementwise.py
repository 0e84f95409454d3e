"""The step shared by optimizers that treat each element alone: fp32 arithmetic, decoupled decay, Kahan summation."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from understudy.optim.per_parameter import PerParameterOptimizer

__all__ = ["ElementwiseOptimizer"]


class ElementwiseOptimizer(PerParameterOptimizer):
    """Adds `change` and weight decay to each weight; state has the parameter's dtype.

    A change is formed in fp32. Weights of a lower precision are summed after Kahan (Zamirai et al., 2020, "Revisiting
    BFloat16 Training"): what rounding takes from the weight is kept in `compensation` and offered again at the next
    step. Decay is inside that sum because a factor such as 1 - 1e-6 rounds to 1 in bf16: multiplying the weight by it
    would not decay at all. Gradients are left as they are. Groups need `lr` and `weight_decay`.
    """

    @abstractmethod
    def change(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """What the step adds to the weight, decay aside: fp32, newly made. `grad` is fp32 and must not be written to.

        `state` is empty at the first step; fp32 tensors put into it are kept in the parameter's dtype.
        """

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        weight = parameter.float()
        change = self.change(grad, state, group).sub_(weight, alpha=group["lr"] * group["weight_decay"])
        if parameter.dtype == torch.float32:
            parameter.add_(change)
            return
        state.update({name: tensor.to(parameter.dtype) for name, tensor in state.items() if tensor.ndim})
        if "compensation" not in state:
            state["compensation"] = torch.zeros_like(parameter)
        change.add_(state["compensation"])
        rounded = (weight + change).to(parameter.dtype)
        # This difference is exact in fp32, so the part of the change that rounding took is known to all its digits.
        state["compensation"].copy_(change.sub_(rounded.float() - weight))
        parameter.copy_(rounded)
