"""Arguments and options that several commands share. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["recipe_arguments"]

Function = TypeVar("Function", bound=Callable[..., Any])


def recipe_arguments(function: Function) -> Function:
    """Adds `RECIPE [key=value …]`, passed as `recipe: Path, overrides: tuple[str, ...]`, as `load_recipe` takes them.

    A missing file is the loader's to report, not click's.
    """
    # Decorators apply from the last line up, so RECIPE comes first on the command line.
    function = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(function)
    return click.argument("recipe", type=click.Path(path_type=Path), metavar="RECIPE")(function)
