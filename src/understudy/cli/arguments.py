"""Arguments and options that several commands share. Imports no torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

__all__ = ["adapter_options", "base_option", "recipe_arguments", "sampling_options", "trust_option"]

Function = TypeVar("Function", bound=Callable[..., Any])


def recipe_arguments(function: Function) -> Function:
    """Adds `RECIPE [key=value …]`, passed as `recipe: Path, overrides: tuple[str, ...]`, as `load_recipe` takes them.

    A missing file is the loader's to report, not click's.
    """
    # Decorators apply from the last line up, so RECIPE comes first on the command line.
    function = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(function)
    return click.argument("recipe", type=click.Path(path_type=Path), metavar="RECIPE")(function)


def adapter_options(function: Function) -> Function:
    """Adds `base: str | None` and `adapter: tuple[str, ...]`, of which one may be given: where an adapter's base is,
    and adapters that share the base that is named as the model."""

    @functools.wraps(function)
    def checked(*, base: str | None, adapter: tuple[str, ...], **others: Any) -> Any:
        if base is not None and adapter:
            raise click.UsageError("with --adapter the model is the base, so there is no place for --base.")
        return function(base=base, adapter=adapter, **others)

    option = click.option(
        "--adapter",
        metavar="ADAPTER",
        multiple=True,
        help="Run MODEL with this adapter: a directory, a run or a Hub id. May be given several times.",
    )
    return cast(Function, base_option(option(checked)))


def base_option(function: Function) -> Function:
    """Adds `base: str | None`: where an adapter's base is."""
    return click.option(
        "--base", metavar="MODEL", help="The model that the adapter belongs to.  [default: where the adapter says]"
    )(function)


def trust_option(function: Function) -> Function:
    """Adds `trust_remote_code: bool`: whether code that ships with a model may run."""
    return click.option(
        "--trust-remote-code", is_flag=True, help="Run the code that ships with the model, where it has its own."
    )(function)


def sampling_options(function: Function) -> Function:
    """Adds how answers are generated: `max_new_tokens: int, temperature: float, top_p: float, seed: int | None`."""

    @functools.wraps(function)
    def checked(*, temperature: float, top_p: float | None, **others: Any) -> Any:
        for name, number in (("--temperature", temperature), ("--top-p", top_p)):
            if number is not None and not math.isfinite(number):
                raise click.UsageError(f"{name} must be a finite number, not {number}.")
        if top_p is not None and temperature == 0.0:
            raise click.UsageError("--top-p narrows a random draw, and there is none without --temperature above 0.")
        return function(temperature=temperature, top_p=1.0 if top_p is None else top_p, **others)

    options = (
        click.option(
            "--max-new-tokens",
            type=click.IntRange(1, 2**31 - 1),
            default=512,
            show_default=True,
            help="Longest answer.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0.0),
            default=0.0,
            show_default=True,
            help="Randomness; 0 takes the likeliest token each time.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(min=0.0, max=1.0, min_open=True),
            help="Draw from the likeliest tokens that hold this share of the probability.  [default: 1]",
        ),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Makes a random draw repeatable."),
    )
    for option in reversed(options):
        checked = option(checked)
    return cast(Function, checked)
