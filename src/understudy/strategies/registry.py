"""Strategies by kind: `understudy.strategies.<kind>` has a `make`, and a `prepare` if it needs one.

A new file is a new strategy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from understudy.contracts import Strategy
from understudy.parallel.world import World
from understudy.recipe.schema import Recipe
from understudy.strategies.precision import precision_of

__all__ = ["make_strategy", "prepare_strategy"]


def prepare_strategy(recipe: Recipe, report: Callable[[str], None]) -> None:
    """What a resolved recipe's strategy can do before there are processes, such as compiling; `report` is given a line
    about what takes time. Raises `UserError` when it cannot run here."""
    prepare = getattr(_module(recipe), "prepare", None)
    if prepare is not None:
        prepare(recipe, report)


def make_strategy(recipe: Recipe, device: torch.device, world: World) -> Strategy:
    """The strategy of a resolved recipe (no `auto` left), not yet built."""
    strategy: Strategy = _module(recipe).make(recipe, device, world, precision_of(recipe.training.precision))
    return strategy


def _module(recipe: Recipe) -> ModuleType:
    assert not isinstance(recipe.strategy, str), "the recipe must be resolved first"
    return importlib.import_module(f"understudy.strategies.{recipe.strategy.kind}")
