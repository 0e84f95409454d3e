"""Holding what a student's layers put out to what its teacher's do, beside what both say.

Shape letters: N supervised positions, n rows of a chunk, H the student's hidden width, Ht the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from understudy.errors import UserError
from understudy.objectives.targets import DenseTargets
from understudy.recipe import objectives as recipe

__all__ = ["HiddenStateLoss", "LayerPair", "TargetsOfLayers", "pair_layers"]

LayerPair = tuple[int, int]
"""A student's decoder layer and a teacher's, from 0."""


@dataclass(frozen=True)
class TargetsOfLayers(DenseTargets):
    """What a teacher says about a micro-batch, and what its layers put out."""

    pairs: tuple[LayerPair, ...]
    outputs: tuple[Tensor, ...]
    """[N, Ht] of the teacher's layer of each pair."""


class HiddenStateLoss:
    """A `LayerLoss`: the mean over pairs of layers of, for P·h and h' of a pair, the mean over the width of (P·h − h')²
    (`mse`) or 1 − cos(P·h, h') (`cosine`); P·h is the student's, mapped, h' the teacher's. Summed over rows."""

    def __init__(self, settings: recipe.HiddenStates, told: TargetsOfLayers) -> None:
        self.weight = settings.weight
        self.layers = tuple(own for own, _ in told.pairs)
        self._distance = _squares if settings.loss == "mse" else _angles
        self._told = told.outputs

    def __call__(self, term: int, outputs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        value, gradient = self._distance(outputs, self._told[term][rows].to(outputs.dtype))
        return value / len(self._told), gradient.div_(len(self._told))


def _squares(own: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
    apart = own - told
    return apart.square().sum() / own.shape[1], apart.mul_(2.0 / own.shape[1])


def _angles(own: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
    """A state of nothing but zeros is at a right angle to all others, and is not moved."""
    length = torch.linalg.vector_norm(own, dim=1, keepdim=True)
    inverse = torch.where(length > 0.0, 1.0 / length, 0.0)
    own, told = own * inverse, torch.nn.functional.normalize(told, dim=1)
    cosine = (own * told).sum(dim=1, keepdim=True)
    return (1.0 - cosine).sum(), own.mul_(cosine).sub_(told).mul_(inverse)


def pair_layers(settings: recipe.HiddenStates, own: int, theirs: int) -> tuple[LayerPair, ...]:
    """Which layer of a student of `own` layers is held to which of a teacher of `theirs`. Raises `UserError` at the
    recipe's key for one that there is not."""
    if settings.layers == "last":
        return ((own - 1, theirs - 1),)
    if settings.layers == "uniform":
        return tuple((i, max(0, round((i + 1) * theirs / own) - 1)) for i in range(own))
    _refuse_outside("student", own, [layer for layer, _ in settings.layers])
    _refuse_outside("teacher", theirs, [layer for _, layer in settings.layers])
    return settings.layers


def _refuse_outside(whose: str, count: int, layers: Sequence[int]) -> None:
    if beyond := [layer for layer in layers if layer >= count]:
        raise UserError(
            f"there is no layer {beyond[0]} in the {whose}, which has {count}; they are counted from 0, so name one up "
            f"to {count - 1}.",
            key="objective.hidden_states.layers",
        )
