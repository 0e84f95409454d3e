"""Muon (Jordan et al., 2024) for hidden matrices and AdamW for the rest, as one optimizer with one learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from understudy.optim.groups import decay_groups, is_hidden_matrix
from understudy.optim.shards import replicated, sharded_like
from understudy.recipe.schema import Optimizer

__all__ = ["MuonAdamW", "make", "orthogonalize"]


def make(
    optimizer: Optimizer, named_parameters: Sequence[tuple[str, nn.Parameter]], *, fused: bool
) -> torch.optim.Optimizer:
    matrices = [(name, parameter) for name, parameter in named_parameters if is_hidden_matrix(name, parameter)]
    others = [(name, parameter) for name, parameter in named_parameters if not is_hidden_matrix(name, parameter)]
    return MuonAdamW(
        decay_groups(matrices, optimizer),
        decay_groups(others, optimizer),
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=fused,
    )


class MuonAdamW(torch.optim.Optimizer):
    """Muon over `matrix_groups` and `torch.optim.AdamW` over `other_groups`.

    Muon's update is scaled to AdamW's root mean square (Liu et al., 2025, "Muon is Scalable for LLM Training"), so that
    both take the same learning rate and weight decay. Its momentum is the first beta. A sharded matrix is gathered for
    its orthogonalisation, one at a time, a collective: on shards, as `torch.optim.Muon` works there, the iterations
    round other sums to bf16 and the update differs by a percent from that of one process.
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
        groups = [{**group, "momentum": betas[0], "orthogonal": True} for group in matrix_groups]
        self._adamw = None
        if other_groups:
            self._adamw = torch.optim.AdamW(other_groups, lr=lr, betas=betas, eps=eps, fused=fused)
            groups += [{**group, "orthogonal": False} for group in self._adamw.param_groups]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("the gradient is computed before the step; a closure would compute it again.")
        for group in self.param_groups:
            if group["orthogonal"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, parameter.grad, group)
        if self._adamw is not None:
            # Shared afresh each time: loading a state dict replaces both containers.
            self._adamw.state = self.state
            self._adamw.param_groups = [group for group in self.param_groups if not group["orthogonal"]]
            self._adamw.step()
        return None

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, momentum, lr = self.state[parameter], group["momentum"], group["lr"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        state["momentum_buffer"].lerp_(grad, 1 - momentum)
        nesterov = replicated(grad.lerp(state["momentum_buffer"], momentum))
        update = orthogonalize(nesterov.to_local() if isinstance(nesterov, DTensor) else nesterov)
        parameter.mul_(1 - lr * group["weight_decay"])
        scale = 0.2 * math.sqrt(max(parameter.shape))
        parameter.add_(sharded_like(update.to(parameter.dtype), parameter), alpha=-lr * scale)


def orthogonalize(matrix: Tensor) -> Tensor:
    """[m, n] with its singular values brought near 1, in bf16: five Newton-Schulz iterations of the odd polynomial
    as + bs³ + cs⁵ whose coefficients Jordan et al. chose for speed, which leaves them between about 0.7 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    estimate = wide.to(torch.bfloat16)
    estimate = estimate / estimate.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = estimate @ estimate.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        estimate = torch.addmm(estimate, polynomial, estimate, beta=a)
    return estimate.T if matrix.shape[0] > matrix.shape[1] else estimate
