"""DeepSpeed's AdamW for optimizer state in host memory, made a function of its state alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from understudy.optim.state import Kept
from understudy.recipe.schema import Optimizer

__all__ = ["make_host_adamw"]


def make_host_adamw(settings: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """`DeepSpeedCPUAdam` whose bias correction depends on the step alone.

    Its C++ side multiplies the betas up from call to call (DeepSpeed 0.14.4 to 0.19.8), and computes their powers only
    where the step or the betas jump. Both round differently, so a run that resumed would differ in the last digit from
    one that did not stop. Here they always jump.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    class HostAdamW(DeepSpeedCPUAdam):  # type: ignore[misc]
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            one = [torch.zeros(1) for _ in range(4)]
            self.ds_opt_adam.adam_update(self.opt_id, 1, 0.0, 0.0, 0.0, 1.0, 0.0, True, *one)
            loss: float | None = super().step(closure)
            return loss

        def kept_state(self, parameter: Tensor) -> Kept:
            state: dict[str, Any] = self.state.get(parameter, {})
            return {key: torch.tensor(float(value)) if key == "step" else value for key, value in state.items()}

        def restore_state(self, parameter: Tensor, kept: Kept) -> None:
            self.state[parameter] = {key: int(value) if key == "step" else value for key, value in kept.items()}

    optimizer: torch.optim.Optimizer = HostAdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, adamw_mode=True
    )
    return optimizer
