"""Learning a teacher's distribution over the vocabulary and its hidden states, mixed with next-token cross-entropy."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from understudy.contracts import IGNORED, Batch, LossSum
from understudy.objectives.distillation_loss import DistillationLoss
from understudy.objectives.divergences.settings import DivergenceSettings
from understudy.objectives.hidden_states import HiddenStateLoss, TargetsOfLayers
from understudy.objectives.teachers.teacher import Teacher
from understudy.recipe import objectives as recipe

__all__ = ["DistillationObjective"]


class DistillationObjective:
    """Σ (1 − w)·τ²·D(teacher, student) + w·cross-entropy over supervised tokens, in nats; a `HiddenStateLoss` is added
    where the recipe asks for one.

    `shared_classes` is the size of the vocabulary that both models' tokenizers share, where targets do not say. Metrics
    are those of `DistillationLoss`.
    """

    def __init__(self, settings: recipe.Distillation, teacher: Teacher, shared_classes: int | None) -> None:
        self._settings = settings
        self._teacher = teacher
        self._shared_classes = shared_classes

    def prepare(self, batch: Batch) -> Batch:
        return replace(batch, targets=self._teacher.targets(batch))

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        settings = self._settings
        token_loss = DistillationLoss(
            settings.divergence,
            batch.labels[batch.labels != IGNORED],
            batch.targets,
            settings=DivergenceSettings(alpha=settings.alpha, beta=settings.beta),
            temperature=settings.temperature,
            cross_entropy_weight=settings.cross_entropy_weight,
            shared_classes=self._shared_classes,
        )
        layer_loss = None
        if settings.hidden_states is not None:
            assert isinstance(batch.targets, TargetsOfLayers), "its teacher is asked for them"
            layer_loss = HiddenStateLoss(settings.hidden_states, batch.targets)
        result: LossSum = model(batch, token_loss, layer_loss=layer_loss)
        return result
