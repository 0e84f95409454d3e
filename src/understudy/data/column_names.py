"""A source's `columns`: which of the user's columns stands for which field of a format."""

from __future__ import annotations

from collections.abc import Mapping

from understudy.data.formats.format import Format
from understudy.errors import UserError
from understudy.recipe.source_map import SourceMap

__all__ = ["check_columns", "rename"]


def rename(row: Mapping[str, object], columns: Mapping[str, str]) -> Mapping[str, object]:
    """`row` with `columns` (our field: their column) under our names. Raises `UserError` when one is missing."""
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            present = ", ".join(map(str, row)) or "none"
            raise UserError(f"the row has no column {theirs!r}, which columns.{ours} names (its columns: {present}).")
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken}
    return {**kept, **{ours: row[theirs] for ours, theirs in columns.items()}}


def check_columns(known: Format, columns: Mapping[str, str], key: str, source_map: SourceMap) -> None:
    """Raises `UserError` at the recipe's line for a field that the format does not read; `key` is the source's."""
    for field in columns:
        if field not in known.columns:
            raise source_map.error(
                f"{key}.columns.{field}",
                f"the format {known.name} has no field {field!r}; it has {', '.join(known.columns)}.",
            )
