"""Look at a recipe's data as the model sees it, count it, or prepare it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    shown = sets.get("evaluation" if evaluation else "train")
    if shown is None:
        raise click.UsageError("this recipe has no evaluation data; give data.eval or data.eval_fraction.")

    from understudy.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_dir, trust_remote_code=loaded.model.trust_remote_code)
    for i in range(min(count, len(shown.cache))):
        if as_json:
            click.echo(json.dumps(_example(shown, i, tokenizer.convert_ids_to_tokens), ensure_ascii=False))
        else:
            _show(shown, i, tokenizer.decode, separate)


@command.command
@recipe_arguments
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def stats(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Count examples and tokens: lengths, supervised share, what was cut or dropped, exact duplicates.

    Example: understudy data stats recipe.yaml data.max_length=1024
    """
    _, _, sets = _prepared(recipe, overrides)

    from understudy.data.inspection import describe

    described = {name: describe(found.cache, found.paths) for name, found in sets.items()}
    if as_json:
        click.echo(json.dumps(described))
    else:
        _print_table(described)


@command.command
@recipe_arguments
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def prepare(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Build the token cache, so that training starts at once; safe to run on many hosts.

    Example: understudy data prepare recipe.yaml
    """
    _, _, sets = _prepared(recipe, overrides)
    if as_json:
        built = {name: {"path": str(s.cache.path), "examples": len(s.cache)} for name, s in sets.items()}
        click.echo(json.dumps(built))
    else:
        for name, found in sets.items():
            click.echo(f"{name}: {found.cache.path}")


@dataclass(frozen=True)
class _Set:
    cache: TokenCache
    paths: tuple[str, ...]
    """Its sources as the recipe names them."""

    def place(self, i: int) -> tuple[str, int]:
        """The source of example `i`, and its row there, from 1."""
        return self.paths[int(self.cache.source[i])], int(self.cache.row[i]) + 1


def _prepared(path: Path, overrides: tuple[str, ...]) -> tuple[Recipe, Path, dict[str, _Set]]:
    """The recipe, its tokenizer's directory, and its sets by name."""
    from understudy.recipe.environment import cache_directory
    from understudy.recipe.load import load_recipe

    recipe, sources = load_recipe(path, overrides)

    from understudy.data.cache import TokenCache
    from understudy.data.prepare import prepare_data
    from understudy.models.source import read_config, tokenizer_directory

    with sources.placing("model.tokenizer" if recipe.model.tokenizer else "model.path"):
        tokenizer_dir = tokenizer_directory(recipe.model)
        grows = False
        if recipe.model.new_tokens:
            from understudy.models.tokenizer import prepared_tokenizer

            own, tokenizer_dir = tokenizer_dir, prepared_tokenizer(recipe.model, cache_directory())
            grows = tokenizer_dir != own
    with sources.placing("model.path"):
        config = read_config(recipe.model)
    # Embeddings that grow have room for every token.
    vocab_size = None if grows else (config.get("text_config") or config).get("vocab_size", config.get("vocab_size"))
    prepared = prepare_data(
        recipe,
        sources,
        tokenizer_dir=tokenizer_dir,
        vocab_size=vocab_size if isinstance(vocab_size, int) else None,
        cache_dir=cache_directory(),
        report=lambda line: click.echo(line, err=True),
    )
    sets = {"train": _Set(TokenCache.open(prepared.train), tuple(source.path for source in recipe.data.train))}
    if prepared.evaluation is not None:
        held_out = recipe.data.train if recipe.data.eval is None else recipe.data.eval
        sets["evaluation"] = _Set(TokenCache.open(prepared.evaluation), tuple(source.path for source in held_out))
    return recipe, tokenizer_dir, sets


def _example(shown: _Set, i: int, texts: Callable[[list[int]], list[str]]) -> dict[str, Any]:
    path, row = shown.place(i)
    supervised = [False, *shown.cache.supervised(i).astype(bool).tolist()[1:]]
    tokens = shown.cache.tokens(i).tolist()
    return {"source": path, "row": row, "tokens": tokens, "texts": texts(tokens), "supervised": supervised}


def _show(shown: _Set, i: int, decode: Callable[[list[int]], str], separate: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from understudy.data.inspection import runs

    console = Console(highlight=False)
    path, row = shown.place(i)
    counts = f"{shown.cache.lengths[i]:,} tokens, {shown.cache.num_supervised[i]:,} supervised"
    console.rule(Text(f"{path}, row {row}: {counts}"), align="left")
    text = Text()
    for run in runs(shown.cache, i):
        words = "│".join(decode([token]) for token in run.tokens) if separate else decode(list(run.tokens))
        marked = f"⟦{words}⟧" if run.supervised and console.color_system is None else words
        text.append(marked, style="green" if run.supervised else "dim")
    console.print(text, soft_wrap=True)


_LABELS = {
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


def _print_table(described: Mapping[str, Mapping[str, Any]]) -> None:
    sets = described.values()
    _print_row("", *described)
    for name, label in _LABELS.items():
        _print_row(label, *(f"{values[name]:,}" for values in sets))
    _print_row("supervised share", *(f"{values['supervised_share']:.1%}" for values in sets))
    _print_row("mean length", *(f"{values['mean_length']:,.1f}" for values in sets))
    for percentile in next(iter(sets))["length_percentiles"]:
        label = f"length, {percentile} %"
        _print_row(label, *(f"{values['length_percentiles'][percentile]:,}" for values in sets))
    for name, values in described.items():
        for source in values["sources"]:
            counts = f"{source['examples']:,} examples, {source['tokens']:,} tokens, {source['truncated']:,} truncated"
            click.echo(f"{name}: {source['path']} ({source['format']}): {counts}")


def _print_row(label: str, *values: str) -> None:
    click.echo(f"{label:<28}" + "".join(f"{value:>14}" for value in values))
