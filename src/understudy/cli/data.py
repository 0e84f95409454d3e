"""Look at a recipe's data as the model sees it, count it, or prepare it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from understudy.cli.arguments import recipe_arguments

if TYPE_CHECKING:
    from understudy.data.cache import TokenCache
    from understudy.recipe.schema import Recipe


@click.group
def command() -> None:
    """Look at a recipe's data as the model sees it, count it, or prepare it.

    Example: understudy data show recipe.yaml -n 3
    """


@command.command
@recipe_arguments
@click.option("-n", "count", type=click.IntRange(min=1), default=3, show_default=True, help="Examples to show.")
@click.option("--evaluation", is_flag=True, help="Show the evaluation data instead of the training data.")
@click.option("--tokens", "separate", is_flag=True, help="Put a bar between tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object an example instead.")
def show(recipe: Path, overrides: tuple[str, ...], count: int, evaluation: bool, separate: bool, as_json: bool) -> None:
    """Show examples as the model sees them; what is trained on is green, or between ⟦ ⟧ where there is no colour.

    Example: understudy data show recipe.yaml -n 3 --tokens
    """
    loaded, tokenizer_dir, sets = _prepared(recipe, overrides)
    if evaluation and "evaluation" not in sets:
        raise click.UsageError("this recipe has no evaluation data; give data.eval or data.eval_fraction.")
    cache = sets["evaluation" if evaluation else "train"]

    from understudy.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_dir, trust_remote_code=loaded.model.trust_remote_code)
    for i in range(min(count, len(cache))):
        if as_json:
            click.echo(json.dumps(_example(cache, i, tokenizer.convert_ids_to_tokens), ensure_ascii=False))
        else:
            _show(cache, i, tokenizer.decode, separate)


@command.command
@recipe_arguments
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def stats(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Count examples and tokens: lengths, supervised share, what was cut or dropped, exact duplicates.

    Example: understudy data stats recipe.yaml data.max_length=1024
    """
    _, _, sets = _prepared(recipe, overrides)

    from understudy.data.inspection import describe

    described = {name: describe(cache) for name, cache in sets.items()}
    if as_json:
        click.echo(json.dumps(described))
    else:
        _table(described)


@command.command
@recipe_arguments
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def prepare(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Build the token cache, so that training starts at once; safe to run on many hosts.

    Example: understudy data prepare recipe.yaml
    """
    _, _, sets = _prepared(recipe, overrides)
    if as_json:
        built = {name: {"path": str(cache.path), "examples": len(cache)} for name, cache in sets.items()}
        click.echo(json.dumps(built))
    else:
        for name, cache in sets.items():
            click.echo(f"{name}: {cache.path}")


def _prepared(path: Path, overrides: tuple[str, ...]) -> tuple[Recipe, Path, dict[str, TokenCache]]:
    from understudy.errors import UserError
    from understudy.recipe.environment import cache_directory
    from understudy.recipe.load import load_recipe

    recipe, sources = load_recipe(path, overrides)

    from understudy.data.cache import TokenCache
    from understudy.data.prepare import prepare_data
    from understudy.models.source import read_config, tokenizer_directory

    try:
        tokenizer_dir = tokenizer_directory(recipe.model)
        config = read_config(recipe.model)
    except UserError as error:
        raise error if error.file else sources.error("model", error.message) from error
    prepared = prepare_data(
        recipe,
        sources,
        tokenizer_dir=tokenizer_dir,
        vocab_size=config.get("vocab_size", config.get("text_config", {}).get("vocab_size")),
        cache_dir=cache_directory(),
        report=lambda line: click.echo(line, err=True),
    )
    found = {"train": prepared.train, "evaluation": prepared.evaluation}
    return recipe, tokenizer_dir, {name: TokenCache.open(path) for name, path in found.items() if path is not None}


def _place(cache: TokenCache, i: int) -> tuple[str, int]:
    """The source's path and the row in it, from 1."""
    return cache.statistics["sources"][int(cache.source[i])]["path"], int(cache.row[i]) + 1


def _example(cache: TokenCache, i: int, texts: Callable[[list[int]], list[str]]) -> dict[str, Any]:
    path, row = _place(cache, i)
    supervised = [False, *cache.supervised(i).astype(bool).tolist()[1:]]
    tokens = cache.tokens(i).tolist()
    return {"source": path, "row": row, "tokens": tokens, "texts": texts(tokens), "supervised": supervised}


def _show(cache: TokenCache, i: int, decode: Callable[[list[int]], str], separate: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from understudy.data.inspection import runs

    console = Console(highlight=False)
    path, row = _place(cache, i)
    console.rule(
        f"{path}, row {row}: {cache.lengths[i]:,} tokens, {cache.num_supervised[i]:,} supervised", align="left"
    )
    text = Text()
    for run in runs(cache, i):
        words = "│".join(decode([token]) for token in run.tokens) if separate else decode(list(run.tokens))
        marked = f"⟦{words}⟧" if run.supervised and console.color_system is None else words
        text.append(marked, style="green" if run.supervised else "dim")
    console.print(text, soft_wrap=True)


def _table(described: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", *described, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    labels = {
        "rows": "rows",
        "examples": "examples",
        "tokens": "tokens",
        "supervised_tokens": "supervised tokens",
        "truncated": "truncated",
        "split": "split",
        "dropped_long": "dropped, too long",
        "dropped_unsupervised": "dropped, nothing supervised",
        "cut_to_prompt": "dropped, cut to the prompt",
        "duplicates": "exact duplicates",
    }
    for name, label in labels.items():
        table.add_row(label, *(f"{values[name]:,}" for values in described.values()))
    table.add_row("supervised share", *(f"{values['supervised_share']:.1%}" for values in described.values()))
    table.add_row("mean length", *(f"{values['mean_length']:,.1f}" for values in described.values()))
    for percentile in next(iter(described.values()))["length_percentiles"]:
        label = f"length, {percentile} %"
        table.add_row(label, *(f"{values['length_percentiles'][percentile]:,}" for values in described.values()))
    for name, values in described.items():
        for source in values["sources"]:
            counts = f"{source['examples']:,} examples, {source['tokens']:,} tokens"
            table.caption = "\n".join(filter(None, [str(table.caption or ""), f"{name}: {source['path']}: {counts}"]))
    table.caption_justify = "left"
    Console().print(table)
