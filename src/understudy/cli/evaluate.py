"""Score a model on a recipe's evaluation data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.arguments import base_option, recipe_arguments

if TYPE_CHECKING:
    from understudy.training.scoring import Scores


@click.command
@click.argument("model", metavar="MODEL")
@recipe_arguments
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    help="Answer so many prompts of the data greedily and compare the answers.  [default: evaluation.samples]",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer of a sample."
)
@base_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(
    model: str,
    recipe: Path,
    overrides: tuple[str, ...],
    samples: int | None,
    max_new_tokens: int,
    base: str | None,
    as_json: bool,
) -> None:
    """Score a model on RECIPE's evaluation data: loss, perplexity, token accuracy; exact match and ROUGE-L of answers.

    MODEL is a Hugging Face directory, a Hub id, or a run or checkpoint directory, of a model or of an adapter; it takes
    the place of the recipe's own. The data is data.eval, or the part of data.train that data.eval_fraction holds out.
    A recipe with a teacher compares the model with it too; `objective=causal_lm` leaves the teacher out.

    Example: understudy evaluate runs/alpaca-smollm2 recipe.yaml --samples 20
    """
    from understudy.recipe.load import load_recipe

    loaded, sources = load_recipe(recipe, overrides)  # before the imports that take seconds

    from understudy.cli.progress import shown_progress
    from understudy.training.scoring import score_model

    with shown_progress() as progress:
        scores = score_model(
            model,
            loaded,
            sources,
            samples=samples,
            max_new_tokens=max_new_tokens,
            report=lambda line: click.echo(line, err=True),
            progress=progress,
            base=base,
        )
    if as_json:
        values = {name: value for name, value in dataclasses.asdict(scores).items() if value is not None}
        click.echo(json.dumps({"model": model, "recipe": str(recipe), **values}))
    else:
        for name, value in _rows(scores):
            click.echo(f"{name:<18}{value:>12}")


def _rows(scores: Scores) -> Iterator[tuple[str, str]]:
    yield "examples", f"{scores.examples:,}"
    yield "supervised tokens", f"{scores.supervised_tokens:,}"
    yield "loss", f"{scores.loss:.4f}"
    yield "perplexity", f"{scores.perplexity:.2f}"
    if scores.token_accuracy is not None:
        yield "token accuracy", f"{scores.token_accuracy:.1%}"
    if scores.calibration_error is not None:
        yield "calibration error", f"{scores.calibration_error:.3f}"
    if scores.divergence is not None:
        yield "cross-entropy", f"{scores.cross_entropy:.4f}"
        yield "divergence", f"{scores.divergence:.4f}"
        yield "teacher agreement", f"{scores.teacher_agreement:.1%}"
    if scores.samples:
        yield "answers", f"{scores.samples:,}"
        yield "exact match", f"{scores.exact_match:.1%}"
        yield "ROUGE-L F1", f"{scores.rouge_l:.3f}"
