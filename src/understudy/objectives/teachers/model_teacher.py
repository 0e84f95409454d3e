"""A teacher that is a model of its own, in each process or shared out over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from understudy.contracts import Batch, HiddenStates
from understudy.models.head import LossHead
from understudy.objectives.hidden_states import LayerPair, TargetsOfLayers
from understudy.objectives.targets import DenseTargets
from understudy.objectives.teachers.teacher import supervised_positions

__all__ = ["ModelTeacher"]


class ModelTeacher:
    """Runs `module`, a `LanguageModel` on `device` with all its weights frozen, in eval mode. Its last hidden states
    are kept, not its logits: `head`, on the student's device and with its weight whole in this process, makes these a
    chunk at a time. With `pairs`, it also gives what its layers in them put out."""

    def __init__(
        self, module: nn.Module, head: LossHead, device: torch.device, pairs: tuple[LayerPair, ...] = ()
    ) -> None:
        self._module: Callable[..., Any] = module.eval()
        self._head = head
        self._device = device
        self._pairs = pairs

    def targets(self, batch: Batch) -> DenseTargets:
        layers = [layer for _, layer in self._pairs]
        with torch.no_grad():
            moved = batch.to(self._device)
            hidden: HiddenStates = self._module(moved, hidden_at=supervised_positions(moved), layers=layers)
        device = batch.tokens.device
        targets = DenseTargets.through(hidden.last.to(device), self._head)
        if not self._pairs:
            return targets
        outputs = tuple(output.to(device) for output in hidden.layers)
        return TargetsOfLayers(targets.logits, targets.count, self._pairs, outputs)
