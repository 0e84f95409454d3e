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
    """Runs `module`, a `LanguageModel` with all its weights frozen, in eval mode. Its last hidden states are kept, not
    its logits: `head`, whose weight is whole in this process, makes these a chunk at a time."""

    def __init__(self, module: nn.Module, head: LossHead) -> None:
        self._module: Callable[..., Any] = module.eval()
        self._head = head

    def targets(self, batch: Batch) -> DenseTargets:
        with torch.no_grad():
            hidden: Tensor = self._module(batch, hidden_at=supervised_positions(batch))
        return DenseTargets.through(hidden, self._head)
