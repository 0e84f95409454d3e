"""Which of a student's layers are held to which of its teacher's, and the maps between them that train beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from understudy.checkpoint.loading import open_maps
from understudy.contracts import LazyTensor
from understudy.errors import UserError
from understudy.models.architecture import load_config
from understudy.models.language_model import LanguageModel
from understudy.models.layer_maps import LayerMaps, first_map
from understudy.models.names import map_name
from understudy.objectives.hidden_states import LayerPair, pair_layers
from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import Model, Recipe
from understudy.training.adapting import Adapted
from understudy.training.job import TeacherPlace

__all__ = ["map_shapes", "matched_layers", "with_maps"]


def matched_layers(recipe: Recipe, student: LanguageModel, place: TeacherPlace) -> tuple[LayerPair, ...]:
    """Pairs of decoder layers of `student` and of the teacher at `place`, none where the recipe asks for none. Raises
    `UserError` at its key for layers that there are not."""
    return _match(recipe, student, place).pairs


def map_shapes(recipe: Recipe, student: LanguageModel, places: Sequence[TeacherPlace]) -> dict[int, tuple[int, int]]:
    """By the student's layer, its teacher's width and its own, where these differ; raises as `matched_layers` does."""
    own = _width(student.config)
    matches = [_match(recipe, student, place) for place in places]
    return {layer: (match.width, own) for match in matches if match.width != own for layer, _ in match.pairs}


def with_maps(adapted: Adapted, recipe: Recipe, places: Sequence[TeacherPlace], checkpoint: Path | None) -> Adapted:
    """`adapted` with what the recipe has train beside it, if anything: as it is in `checkpoint`, or at first values
    that the seed determines. Changes `adapted.model`; the same on every rank. Raises `UserError` for a checkpoint that
    has other maps."""
    objective = recipe.objective
    if not isinstance(objective, Distillation) or objective.hidden_states is None:
        return adapted
    shapes = map_shapes(recipe, adapted.model, places)
    adapted.model.distillation = LayerMaps(shapes)
    layers = {map_name(layer): layer for layer in shapes}
    stored = None if checkpoint is None else open_maps(checkpoint)
    if stored is not None and {name: tensor.shape for name, tensor in stored.items()} != {
        name: shapes[layer] for name, layer in layers.items()
    }:
        raise UserError("it was not trained with the maps between hidden states that objective.hidden_states asks for.")

    def read(name: str) -> LazyTensor:
        if name not in layers:
            return adapted.read(name)
        if stored is not None:
            return stored[name]
        return first_map(recipe.training.seed, layers[name], shapes[layers[name]])

    return replace(adapted, read=read)


class _Match(NamedTuple):
    pairs: tuple[LayerPair, ...]
    width: int
    """The teacher's."""


def _match(recipe: Recipe, student: LanguageModel, place: TeacherPlace) -> _Match:
    objective, own = recipe.objective, len(student.decoder_layers())
    if not isinstance(objective, Distillation) or objective.hidden_states is None:
        return _Match((), 0)
    if place.directory is None:  # its own base
        return _Match(pair_layers(objective.hidden_states, own, own), _width(student.config))
    config = load_config(place.directory, Model(path=str(place.directory)))
    pairs = pair_layers(objective.hidden_states, own, int(config.get_text_config().num_hidden_layers))
    return _Match(pairs, _width(config))


def _width(config: Any) -> int:
    return int(config.get_text_config().hidden_size)
