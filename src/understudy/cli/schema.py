"""Print the JSON schema of a recipe, for an editor to complete and check it."""

from __future__ import annotations

import json

import click


@click.command
def command() -> None:
    """Print the JSON schema of a recipe, for an editor to complete and check it.

    Example: understudy schema > recipe.schema.json, and in the recipe's first line
    "# yaml-language-server: $schema=recipe.schema.json".
    """
    from understudy.recipe.json_schema import recipe_json_schema

    click.echo(json.dumps(recipe_json_schema(), indent=2, ensure_ascii=False))
