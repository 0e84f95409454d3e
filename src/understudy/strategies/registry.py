"""Strategies by kind: `understudy.strategies.<kind>` has a `make`; a new file is a new strategy."""

from __future__ import annotations

import importlib

import torch

from understudy.contracts import Strategy
from understudy.parallel.world import World
from understudy.recipe.schema import Recipe
from understudy.strategies.precision import precision_of

__all__ = ["make_strategy"]


def make_strategy(recipe: Recipe, device: torch.device, world: World) -> Strategy:
    """The strategy of a resolved recipe (no `auto` left), not yet built."""
    assert not isinstance(recipe.strategy, str), "the recipe must be resolved first"
    module = importlib.import_module(f"understudy.strategies.{recipe.strategy.kind}")
    strategy: Strategy = module.make(recipe, device, world, precision_of(recipe.training.precision))
    return strategy
