"""A teacher that is a model of its own, in each process or shared out over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from understudy.contracts import Batch
from understudy.models.head import LossHead
from understudy.objectives.targets import DenseTargets
from understudy.objectives.teachers.teacher import supervised_positions

__all__ = ["ModelTeacher"]


class ModelTeacher:
    """Runs `module`, a `LanguageModel` on `device` with all its weights frozen, in eval mode. Its last hidden states
    are kept, not its logits: `head`, on the student's device and with its weight whole in this process, makes these a
    chunk at a time."""

    def __init__(self, module: nn.Module, head: LossHead, device: torch.device) -> None:
        self._module: Callable[..., Any] = module.eval()
        self._head = head
        self._device = device

    def targets(self, batch: Batch) -> DenseTargets:
        with torch.no_grad():
            moved = batch.to(self._device)
            hidden: Tensor = self._module(moved, hidden_at=supervised_positions(moved))
        return DenseTargets.through(hidden.to(batch.tokens.device), self._head)
