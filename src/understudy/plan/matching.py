"""What holding a student's hidden states to its teacher's takes (`objectives.hidden_states`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from understudy.plan.network import Held, Network
from understudy.plan.shape.model import ModelShape
from understudy.recipe.objectives import Distillation, HiddenStates, Objective
from understudy.recipe.teachers import BaseTeacher

__all__ = ["matched_width", "with_maps"]


def with_maps(network: Network, objective: Objective, teachers: Sequence[ModelShape | None]) -> Network:
    """`network` with the maps that train beside it, one for each layer that is held to one of another width."""
    own = network.shape.sizes
    shapes = {
        layer: (width, own.hidden)
        for layers, width in _matches(network, objective, teachers)
        if width != own.hidden
        for layer in layers
    }
    maps = tuple(Held(shape, "map", True) for shape in shapes.values())
    return replace(network, outside=network.outside + maps)


def matched_width(network: Network, objective: Objective, teachers: Sequence[ModelShape | None]) -> int:
    """Elements a token, over all pairs of layers, of what the teacher's put out and of the gradients of what the
    student's do, which are made with the loss and wait for the backward pass."""
    own = network.shape.sizes.hidden
    return sum(len(layers) * (width + own) for layers, width in _matches(network, objective, teachers))


def _matches(
    network: Network, objective: Objective, teachers: Sequence[ModelShape | None]
) -> Iterator[tuple[tuple[int, ...], int]]:
    """For each teacher that is a model here, the student's layer of each pair, and the teacher's width."""
    if not isinstance(objective, Distillation) or objective.hidden_states is None:
        return
    for section, shape in zip(objective.teachers, teachers, strict=True):
        sizes = network.shape.sizes if isinstance(section, BaseTeacher) else shape and shape.sizes
        if sizes:
            yield _layers(objective.hidden_states, network.shape.sizes.layers), sizes.hidden


def _layers(settings: HiddenStates, own: int) -> tuple[int, ...]:
    if settings.layers == "last":
        return (own - 1,)
    return tuple(range(own)) if settings.layers == "uniform" else tuple(layer for layer, _ in settings.layers)
