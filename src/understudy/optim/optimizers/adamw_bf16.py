"""AdamW over bf16 weights and moments, with Kahan summation so that small updates are not lost ("AnyPrecision")."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from understudy.optim.groups import decay_groups
from understudy.optim.shards import over_local_shards
from understudy.recipe.schema import Optimizer

__all__ = ["KahanAdamW", "make"]


def make(
    optimizer: Optimizer, named_parameters: Sequence[tuple[str, nn.Parameter]], *, fused: bool
) -> torch.optim.Optimizer:
    return over_local_shards(
        decay_groups(named_parameters, optimizer.weight_decay),
        lambda groups: KahanAdamW(groups, lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.eps),
    )


class KahanAdamW(torch.optim.Optimizer):
    """AdamW whose weights, moments and compensation have the parameter's dtype: 8 bytes a bf16 parameter, 10 with its
    gradient.

    The update, weight decay included, is formed in fp32 and added with Kahan summation (Zamirai et al., 2020,
    "Revisiting BFloat16 Training"): what rounding takes from the weight is kept in `compensation` and offered again at
    the next step. Decay is inside the sum because a factor such as 1 - 1e-6 rounds to 1 in bf16: multiplying the weight
    by it would not decay at all. The gradient is left as it is.
    """

    def __init__(self, params: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("the gradient is computed before the step; a closure would compute it again.")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return None

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            # A host tensor, like PyTorch's own: no device read is needed for the bias correction.
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq", "compensation"):
                state[name] = torch.zeros_like(parameter)
        state["step"] += 1
        step = state["step"].item()
        (beta1, beta2), lr = group["betas"], group["lr"]
        grad = grad.float()
        mean = torch.lerp(state["exp_avg"].float(), grad, 1 - beta1)
        square = (state["exp_avg_sq"].float() * beta2).addcmul_(grad, grad, value=1 - beta2)
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)

        weight = parameter.float()
        denominator = square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        change = torch.add(state["compensation"].float(), weight, alpha=-lr * group["weight_decay"])
        change.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))
        rounded = (weight + change).to(parameter.dtype)
        # This difference is exact in fp32, so the part of the change that rounding took is known to all its digits.
        state["compensation"].copy_(change.sub_(rounded.float() - weight))
        parameter.copy_(rounded)
