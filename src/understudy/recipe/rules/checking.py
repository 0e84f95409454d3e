"""Judges a recipe by all rules, and reports all violations at once. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from understudy.errors import RecipeError, UserError, Violation
from understudy.recipe.deepspeed_file import contradictions, deepspeed_source, read_deepspeed_file
from understudy.recipe.rules.rule import RULES
from understudy.recipe.rules.run import process_violations
from understudy.recipe.schema import DeepSpeed, Recipe
from understudy.recipe.source_map import SourceMap

__all__ = ["check", "check_processes"]


def check(recipe: Recipe, source: SourceMap, violations: Sequence[Violation] = ()) -> None:
    """Raises `RecipeError` with `violations` and those of every rule, if there are any."""
    found = list(violations)
    strategy = recipe.strategy
    if isinstance(strategy, DeepSpeed) and strategy.config is not None:
        try:
            config = read_deepspeed_file(strategy.config)
        except UserError as error:
            found.append(Violation("strategy.config", error.message, error.file, error.line))
            # The other rules still have their say, about what the recipe itself states.
            recipe = recipe.model_copy(update={"strategy": strategy.model_copy(update={"config": None})})
        else:
            lines = deepspeed_source(strategy.config)
            found.extend(lines.violation(key, message) for key, message in contradictions(config, recipe))
    found.extend(source.violation(key, message) for rule in RULES for key, message in rule(recipe))
    if found:
        raise RecipeError(found)


def check_processes(recipe: Recipe, processes: int, source: SourceMap) -> None:
    """Raises `RecipeError` when the run cannot be split over so many processes."""
    found = [source.violation(key, message) for key, message in process_violations(recipe, processes)]
    if found:
        raise RecipeError(found)
