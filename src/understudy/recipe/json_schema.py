"""The recipe's JSON schema, for completion and checks in an editor. Imports no torch."""

from __future__ import annotations

from typing import Any

from understudy.recipe.presets import STRATEGY_PRESETS
from understudy.recipe.schema import Recipe

__all__ = ["recipe_json_schema"]

_BARE_KINDS = ("adapter", "objective", "optimizer", "schedule")


def recipe_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file; the bare strings that stand for a mapping are in it."""
    schema = Recipe.model_json_schema()
    # The loader fills these two in.
    schema["required"] = [name for name in schema["required"] if name not in ("name", "output_dir")]
    properties = schema["properties"]
    for name in _BARE_KINDS:
        properties[name] = _or_strings(properties[name], _kinds(schema, properties[name]))
    properties["strategy"] = _or_strings(properties["strategy"], ["auto", *STRATEGY_PRESETS])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Understudy recipe"}


def _or_strings(field: dict[str, Any], strings: list[str]) -> dict[str, Any]:
    """`field` widened by bare strings, with its description and default kept outside."""
    outer: dict[str, Any] = {key: field[key] for key in ("description", "default") if key in field}
    mappings = [part for part in _alternatives(field) if "const" not in part]
    return {**outer, "anyOf": [{"type": "string", "enum": strings}, *mappings]}


def _alternatives(field: dict[str, Any]) -> list[dict[str, Any]]:
    inner = {key: value for key, value in field.items() if key not in ("description", "default", "title")}
    return list(inner["anyOf"]) if "anyOf" in inner else [inner]


def _kinds(schema: dict[str, Any], field: dict[str, Any]) -> list[str]:
    """Every value that `kind` takes in the mappings that `field` refers to and that need no other field."""
    kinds: list[str] = []
    for part in _alternatives(field):
        for reference in [part, *part.get("oneOf", [])]:
            if "$ref" in reference:
                section = schema["$defs"][reference["$ref"].rpartition("/")[2]]
                kind = section["properties"]["kind"]
                if not section.get("required"):
                    kinds += kind["enum"] if "enum" in kind else [kind["const"]]
    return kinds
