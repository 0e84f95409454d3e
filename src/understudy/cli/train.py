"""Train a model as a recipe says: prepare data, start processes, train, evaluate, save, prove that it loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.arguments import recipe_arguments
from understudy.errors import StoppedError, UserError

if TYPE_CHECKING:
    from understudy.recipe.environment import ProcessEnvironment


@click.command
@recipe_arguments
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in the output directory.")
def command(recipe: Path, overrides: tuple[str, ...], overwrite: bool) -> int:
    """Train a model as RECIPE says: prepare data, start processes, train, evaluate, save, prove that it loads.

    Starts one process a device on this host, or cluster.processes of them; with NNODES, NODE_RANK, MASTER_ADDR and
    MASTER_PORT set, as one of several hosts. Under torchrun, accelerate launch, deepspeed or srun it is one of their
    processes.

    Example: understudy train recipe.yaml training.epochs=1 cluster.processes=2
    """
    from understudy.recipe.environment import process_environment

    environment = process_environment()
    try:
        _train(recipe, overrides, environment, overwrite=overwrite)
    except (StoppedError, UserError) as error:
        # Wrong input and a request to stop meet every process of a launcher alike; one of each host says so.
        if environment is None or environment.local_rank == 0:
            raise
        return error.exit_status
    return 0


def _train(path: Path, overrides: tuple[str, ...], environment: ProcessEnvironment | None, *, overwrite: bool) -> None:
    from understudy.recipe.environment import host_environment
    from understudy.recipe.load import load_recipe

    host = host_environment()
    recipe, sources = load_recipe(path, overrides)
    if environment is None:
        from understudy.training.start import start_locally

        start_locally(recipe, sources, overwrite=overwrite, say=click.echo, host=host)
    else:
        from understudy.training.as_worker import start_as_worker

        start_as_worker(recipe, sources, environment, overwrite=overwrite, say=click.echo)
