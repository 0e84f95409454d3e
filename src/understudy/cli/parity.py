"""Train the same steps under several strategies and print how far apart they are; exit 1 above tolerance."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.arguments import recipe_arguments

if TYPE_CHECKING:
    from understudy.training.parity import Difference, Tolerance

DEFAULT_STRATEGIES = "ddp,fsdp,zero1,zero2,zero3"


@click.command
@recipe_arguments
@click.option(
    "--strategies", default=DEFAULT_STRATEGIES, show_default=True, help="Strategies to compare, separated by commas."
)
@click.option("--processes", type=click.IntRange(min=1), default=2, show_default=True, help="Processes of each run.")
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Optimizer steps of each run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    recipe: Path, overrides: tuple[str, ...], strategies: str, processes: int, steps: int, as_json: bool
) -> int:
    """Train the same steps of RECIPE in one process, then under each strategy, and print the largest differences.

    Exit status 1 when a loss, a gradient norm or the weights differ by more than rounding explains.

    Example: understudy parity recipe.yaml --strategies ddp,fsdp,zero2,zero3 --processes 2 --steps 10
    """
    from understudy.recipe.load import load_recipe

    load_recipe(recipe, overrides)  # a wrong recipe is answered before anything heavy is imported
    from understudy.training.parity import compare_strategies

    names = [name.strip() for name in strategies.split(",") if name.strip()]
    if not names:
        raise click.UsageError("--strategies names no strategy; name one or more, such as ddp,fsdp.")
    report = (lambda _: None) if as_json else click.echo
    rows = list(compare_strategies(recipe, overrides, names, processes, steps, report))
    click.echo(_json(rows) if as_json else _table(rows))
    return 0 if all(difference.within(tolerance) for difference, tolerance in rows) else 1


def _json(rows: list[tuple[Difference, Tolerance]]) -> str:
    return json.dumps(
        {
            "tolerance": asdict(rows[0][1]),
            "strategies": [
                {**asdict(difference), "within_tolerance": difference.within(tolerance)}
                for difference, tolerance in rows
            ],
        }
    )


def _table(rows: list[tuple[Difference, Tolerance]]) -> str:
    tolerance = rows[0][1]
    lines = [
        "largest differences from one process",
        f"{'strategy':<15}{'processes':>10}{'loss':>12}{'grad norm':>12}{'weights':>12}{'max weight':>12}",
    ]
    for row, _ in rows:
        verdict = "" if row.within(tolerance) else "  above tolerance"
        lines.append(
            f"{row.strategy:<15}{row.processes:>10}{row.loss:>12.1e}{row.norm:>12.1e}{row.weights:>12.1e}"
            f"{row.largest_weight:>12.1e}{verdict}"
        )
    lines.append(f"{'tolerance':<15}{'':>10}{tolerance.loss:>12.1e}{tolerance.norm:>12.1e}{tolerance.weights:>12.1e}")
    lines.append("weights: distance apart, as a share of the distance that training moved them")
    return "\n".join(lines)
