"""Turn a DeepSpeed checkpoint into one that any strategy resumes from."""

from __future__ import annotations

from pathlib import Path

import click

from understudy.cli.arguments import recipe_arguments


@click.command
@click.argument("checkpoint", metavar="CHECKPOINT", type=click.Path(path_type=Path))
@recipe_arguments
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Where to write; must not exist.")
def command(checkpoint: Path, recipe: Path, overrides: tuple[str, ...], out: Path) -> None:
    """Turn what DeepSpeed's engine saved in CHECKPOINT, at ZeRO stage 1, 2 or 3, into a checkpoint of RECIPE's model.

    CHECKPOINT is the directory that `save_checkpoint` wrote, with the file `latest` in it, or a `global_stepN` inside.
    Weights, Adam's moments and the step are taken over; training then goes on with checkpoint.resume=OUT. DeepSpeed's
    checkpoints are pickles, and its own tool, which reads them, runs what is in them: import only what you trust.

    Example: understudy import outputs/checkpoint-500 recipe.yaml -o imported
    """
    from understudy.recipe.load import load_recipe

    loaded, sources = load_recipe(recipe, overrides)  # before the imports that take seconds

    from understudy.training.importing import import_deepspeed_checkpoint

    written = import_deepspeed_checkpoint(
        checkpoint.expanduser(), loaded, sources, out.expanduser(), lambda line: click.echo(line, err=True)
    )
    click.echo(f"imported {written}; go on from it with `understudy train {recipe} checkpoint.resume={out}`")
