"""Writes the tables of fields in recipes.md from the recipe's schema, so that they cannot drift.

    python docs/make_reference.py            # rewrites docs/recipes.md
    python docs/make_reference.py --check    # exit status 1 when it is not up to date

A table stands between `<!-- fields: NAME -->`, NAME a section of `understudy schema` or Recipe, and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from understudy.recipe.json_schema import recipe_json_schema

PAGE = Path(__file__).parent / "recipes.md"
TABLE = re.compile(r"(<!-- fields: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
BOUNDS = (("exclusiveMinimum", "above"), ("minimum", "at least"), ("exclusiveMaximum", "below"), ("maximum", "at most"))
TYPES = {"string": "text", "boolean": "true, false", "integer": "whole number", "number": "number", "null": "null"}


def with_tables(page: str) -> str:
    """`page` with each table between its marks written anew. Raises `KeyError` for a section that does not exist."""
    return TABLE.sub(lambda found: found[1] + table(found[2]) + found[3], page)


def table(section: str) -> str:
    """A Markdown table: field, what it may be, default, meaning."""
    schema = recipe_json_schema()
    fields = schema if section == "Recipe" else schema["$defs"][section]
    lines = ["| field | values | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields["properties"].items():
        if "const" in field:  # the `kind` that names the section itself
            continue
        required = name in fields.get("required", ())
        cells = (f"`{name}`", values(field), "required" if required else default(field), field.get("description", ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def values(field: dict[str, Any]) -> str:
    """What a field may hold, in words."""
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " or ".join(dict.fromkeys(values(part) for part in field[several]))
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in field.get("enum", [field.get("const")]))
    if "prefixItems" in field:
        return f"list of {len(field['prefixItems'])}: " + " or ".join(dict.fromkeys(map(values, field["prefixItems"])))
    if field["type"] == "array":
        return "list of " + values(field["items"])
    if field["type"] == "object":
        return "mapping"
    bounds = [f"{word} {field[key]}" for key, word in BOUNDS if key in field]
    return " ".join([TYPES[field["type"]], *bounds])


def default(field: dict[str, Any]) -> str:
    """The default as a recipe would write it; a section's own fields show theirs."""
    if "default" not in field:
        return "`{}`" if field.get("type") == "object" else ""
    value = field["default"]
    if isinstance(value, dict):
        return f"`{value['kind']}`" if "kind" in value else "its fields'"
    return f"`{json.dumps(value).strip(chr(34))}`"


def main(arguments: list[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    written = with_tables(page)
    if arguments == ["--check"]:
        sys.exit(None if written == page else f"{PAGE} is not up to date; run python {__file__}")
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
