"""What a format is: how one row is read. A module here that holds a `FORMAT` is found by the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from understudy.data.examples import Conversation, Document
from understudy.errors import UserError

__all__ = ["Format", "Row", "required", "text_of"]

Row = Mapping[str, Any]


class Format(Protocol):
    @property
    def name(self) -> str:
        """As the recipe says it."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column it may read, those it needs first."""
        ...

    def recognises(self, row: Row) -> bool:
        """Whether a row of these columns looks like this format; no two formats recognise the same row."""
        ...

    def parse(self, row: Row) -> Conversation | Document:
        """Reads one row. Raises `UserError`, without a place, when the row is not in this format."""
        ...


def required(row: Row, column: str, format_name: str) -> Any:
    """The row's value in `column`. Raises `UserError` when there is no such column."""
    if column not in row:
        present = ", ".join(map(str, row)) or "none"
        raise UserError(
            f"the row has no column {column!r}, which the format {format_name} needs (its columns: {present}); "
            f"set format, or columns: {{{column}: <the column's name>}}, for this source."
        )
    return row[column]


def text_of(value: Any, column: str) -> str:
    """`value` as text; null is the empty string. Raises `UserError` for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"the column {column!r} must hold text, but holds {value!r:.40}.")
    return value
