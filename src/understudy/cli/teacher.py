"""What a distillation asks of its teacher before training."""

from __future__ import annotations

from pathlib import Path

import click

from understudy.cli.arguments import recipe_arguments


@click.group
def command() -> None:
    """Ask a teacher once, and keep what it says for any number of runs.

    Example: understudy teacher cache recipe.yaml
    """


@command.command
@recipe_arguments
def cache(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Keep what the recipe's teacher says of its data: of a recipe with `objective.teacher: {kind: cache, …}`.

    The cache is found by what is in it: teacher, tokenizer, temperature and targets name it, and tokens name each
    example, so that another order, batch size, number of processes or epoch uses the same one. Run it again after it
    was interrupted, or when data were added: what is there stays.

    Example: understudy teacher cache recipe.yaml cluster.processes=2
    """
    from understudy.recipe.load import load_recipe

    loaded, sources = load_recipe(recipe, overrides)  # before the imports that take seconds

    from understudy.training.teacher_cache import build_teacher_caches

    build_teacher_caches(loaded, sources, click.echo)
