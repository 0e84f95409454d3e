"""Train a model as a recipe says: prepare data, start processes, train, evaluate, save, prove that it loads."""

from __future__ import annotations

from pathlib import Path

import click

from understudy.cli.arguments import recipe_arguments


@click.command
@recipe_arguments
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in the output directory.")
def command(recipe: Path, overrides: tuple[str, ...], overwrite: bool) -> None:
    """Train a model as RECIPE says: prepare data, start processes, train, evaluate, save, prove that it loads.

    Starts one process a device on this host, or cluster.processes of them. Under torchrun, accelerate launch, deepspeed
    or srun it is one of their processes.

    Example: understudy train recipe.yaml training.epochs=1 cluster.processes=2
    """
    from understudy.recipe.environment import process_environment
    from understudy.recipe.load import load_recipe
    from understudy.training.start import start_as_worker, start_locally

    loaded, sources = load_recipe(recipe, overrides)
    environment = process_environment()
    if environment is None:
        start_locally(loaded, sources, overwrite=overwrite, say=click.echo)
    else:
        start_as_worker(loaded, sources, environment, overwrite=overwrite, say=click.echo)
