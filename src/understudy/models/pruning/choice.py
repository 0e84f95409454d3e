"""What a recipe keeps of a model: layers by list, by rule or by measured importance, widths by importance."""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.errors import UserError
from understudy.models.pruning.importance import Importance, Measured
from understudy.models.pruning.structure import Kept, Structure
from understudy.recipe.schema import Model

__all__ = ["choose", "described", "measured_parts", "require_possible"]


def measured_parts(model: Model) -> tuple[Measured, ...]:
    """What must be measured before it can be chosen."""
    asked: dict[Measured, bool] = {
        "layers": model.layers == "importance",
        "heads": model.keep_heads is not None,
        "channels": model.intermediate_size is not None,
        "width": model.hidden_size is not None,
    }
    return tuple(part for part, wanted in asked.items() if wanted)


def require_possible(model: Model, structure: Structure) -> None:
    """Raises `UserError` at the field of `model` that asks for what `structure` has not, or for all that it has, before
    anything is measured."""
    last = structure.layers - 1
    if isinstance(model.layers, tuple) and model.layers[-1] > last:
        raise UserError(
            f"the model has no layer {model.layers[-1]}; its {structure.layers} layers are 0 to {last}.",
            key="model.layers",
        )
    _at_most(model.keep_layers, structure.layers, "keep_layers", "layers")
    if model.keep_heads is not None:
        _at_most(model.keep_heads, structure.heads, "keep_heads", "heads")
        if model.keep_heads % structure.queries_per_group:
            raise UserError(
                f"heads are kept with the key and value that they share, {structure.queries_per_group} at a time in "
                f"this model of {structure.heads}; set model.keep_heads to a multiple of that.",
                key="model.keep_heads",
            )
    if model.intermediate_size is not None:
        _at_most(model.intermediate_size, structure.channels, "intermediate_size", "feed-forward channels")
    _at_most(model.hidden_size, structure.width, "hidden_size", "dimensions")
    kept = choose(model, structure, _equal_importance(model, structure))
    if kept == Kept(tuple(range(structure.layers))):
        raise UserError(
            "nothing of the model is cut: it has these sizes already; keep less, or set model.init to pretrained.",
            key="model.init",
        )
    structure.network_of(kept)


def choose(model: Model, structure: Structure, importance: Importance) -> Kept:
    """What `model`, for which `require_possible` holds, keeps of `structure`. `importance` has all of
    `measured_parts`. Of equals the first are kept."""
    layers = _layers(model, structure, importance.layers)
    groups = channels = width = None
    if model.keep_heads is not None and model.keep_heads < structure.heads:
        count = model.keep_heads // structure.queries_per_group
        shared = _of(importance.heads).reshape(structure.layers, structure.groups, -1).sum(dim=-1)
        groups = tuple(_best(shared[layer], count) for layer in layers)
    if model.intermediate_size is not None and model.intermediate_size < structure.channels:
        scores = _of(importance.channels)
        channels = tuple(_best(scores[layer], model.intermediate_size) for layer in layers)
    if model.hidden_size is not None and model.hidden_size < structure.width:
        width = _best(_of(importance.width)[[*layers, structure.layers]].sum(dim=0), model.hidden_size)
    return Kept(layers, groups, channels, width)


def described(kept: Kept, structure: Structure) -> str:
    """What is kept, in words."""
    parts = []
    if (count := len(kept.layers)) < structure.layers:
        parts.append(f"{count} of {structure.layers} layers ({', '.join(map(str, kept.layers))})")
    if kept.groups is not None:
        parts.append(f"{len(kept.groups[0]) * structure.queries_per_group} of {structure.heads} heads")
    if kept.channels is not None:
        parts.append(f"{len(kept.channels[0]):,} of {structure.channels:,} feed-forward channels")
    if kept.width is not None:
        parts.append(f"{len(kept.width):,} of {structure.width:,} dimensions")
    return ", ".join(parts)


def _layers(model: Model, structure: Structure, importance: Tensor | None) -> tuple[int, ...]:
    total, count = structure.layers, model.keep_layers
    if model.layers is None:
        return tuple(range(total))
    if isinstance(model.layers, tuple):
        return model.layers
    assert count is not None, "a rule of recipes"
    if model.layers == "uniform":
        gaps = max(1, count - 1)  # rounded in whole numbers, so that every machine rounds alike
        return tuple((2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(count))
    if model.layers == "first":
        return tuple(range(count))
    if model.layers == "first_and_last":
        return (*range(count - 1), total - 1)
    return _best(_of(importance), count)


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    """The indices of the `count` highest of `scores` [n], ascending."""
    order = torch.argsort(scores, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def _of(measured: Tensor | None) -> Tensor:
    assert measured is not None, "all that is chosen by importance was measured"
    return measured


def _equal_importance(model: Model, structure: Structure) -> Importance:
    """All parts alike, to try what sizes would be kept."""
    return Importance(
        layers=torch.zeros(structure.layers),
        heads=torch.zeros(structure.layers, structure.heads),
        channels=None if model.intermediate_size is None else torch.zeros(structure.layers, structure.channels),
        width=torch.zeros(structure.layers + 1, structure.width),
    )


def _at_most(asked: int | None, there: int, field: str, what: str) -> None:
    if asked is not None and asked > there:
        raise UserError(
            f"model.{field} is {asked:,}, but the model has {there:,} {what}; ask for fewer.", key=f"model.{field}"
        )
