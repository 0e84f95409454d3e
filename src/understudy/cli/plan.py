"""Predict memory and speed of a recipe under every strategy, and say what fits."""

from __future__ import annotations

import json
from pathlib import Path

import click

from understudy.cli.arguments import recipe_arguments


@click.command
@recipe_arguments
@click.option(
    "--hardware",
    metavar="[N x]NAME",
    help="Devices of one host, such as 8xA100-80GB, 4x910B-64GB or cpu:24GiB.  [default: this machine]",
)
@click.option("--nodes", type=click.IntRange(1, 1024), default=1, show_default=True, help="Hosts with such devices.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the memory of each strategy: .html or .png.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Also run the strategy that is taken, with the real model and tensors without memory: seconds to minutes.",
)
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    hardware: str | None,
    nodes: int,
    as_json: bool,
    picture: Path | None,
    exact: bool,
) -> None:
    """Predict memory and speed of RECIPE under every strategy, from the model's configuration alone: what fits, how
    large a micro-batch may be, how fast it goes and what it waits for.

    What the recipe fixes (strategy, training.micro_batch_tokens, training.activation_checkpointing) is kept; the rest
    is searched for the fastest that fits. Nothing is downloaded but the model's config.json.

    Example: understudy plan recipe.yaml --hardware 8xA100-80GB --picture plan.html
    """
    from understudy.plan.report import report_lines
    from understudy.recipe.load import load_recipe
    from understudy.recipe.rules import check_processes
    from understudy.training.planning import asked_hardware, find_shapes, plan_for

    loaded, sources = load_recipe(recipe, overrides)
    machine = asked_hardware(loaded, hardware, nodes)
    check_processes(loaded, machine.devices, sources)
    shapes = find_shapes(loaded, sources)
    plan = plan_for(loaded, sources, machine, here=hardware is None, shapes=shapes)
    if picture is not None:
        from understudy.plan.picture import write_picture

        write_picture(plan, picture)
    if not as_json:
        for line in report_lines(plan):
            click.echo(line)
    answer = plan.to_json()
    if exact:
        from understudy.simulation.exact import simulate_plan

        with sources.placing("model"):
            simulated = simulate_plan(loaded, plan, shapes.teachers)
        answer["exact"] = simulated.to_json()
        if not as_json:
            click.echo("\n".join(["", *simulated.lines()]))
    if as_json:
        click.echo(json.dumps(answer))
