"""Muon (Jordan et al., 2024) for hidden matrices and AdamW for the rest, as one optimizer with one learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from understudy.optim.groups import decay_groups, is_hidden_matrix
from understudy.recipe.schema import Optimizer

__all__ = ["MuonAdamW", "make"]


def make(
    optimizer: Optimizer, named_parameters: Sequence[tuple[str, nn.Parameter]], *, fused: bool
) -> torch.optim.Optimizer:
    matrices = [(name, parameter) for name, parameter in named_parameters if is_hidden_matrix(name, parameter)]
    others = [(name, parameter) for name, parameter in named_parameters if not is_hidden_matrix(name, parameter)]
    return MuonAdamW(
        decay_groups(matrices, optimizer.weight_decay),
        decay_groups(others, optimizer.weight_decay),
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=fused,
    )


class MuonAdamW(torch.optim.Optimizer):
    """Steps `torch.optim.Muon` and `torch.optim.AdamW` over its own groups and state.

    Muon's update is scaled to AdamW's root mean square (Liu et al., 2025, "Muon is Scalable for LLM Training"), so that
    both take the same learning rate and weight decay. Its momentum is the first beta.
    """

    def __init__(
        self,
        matrix_groups: list[dict[str, Any]],
        other_groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
    ) -> None:
        self._steppers: dict[str, torch.optim.Optimizer] = {}
        if matrix_groups:
            self._steppers["muon"] = torch.optim.Muon(
                matrix_groups, lr=lr, momentum=betas[0], adjust_lr_fn="match_rms_adamw"
            )
        if other_groups:
            self._steppers["adamw"] = torch.optim.AdamW(other_groups, lr=lr, betas=betas, eps=eps, fused=fused)
        groups = [
            {**group, "algorithm": algorithm}
            for algorithm, stepper in self._steppers.items()
            for group in stepper.param_groups
        ]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("the gradient is computed before the step; a closure would compute it again.")
        for algorithm, stepper in self._steppers.items():
            # Shared afresh each time: loading a state dict replaces both containers.
            stepper.state = self.state
            stepper.param_groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            stepper.step()
        return None
