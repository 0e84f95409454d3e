"""A row of a data file, and where it stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from understudy.errors import UserError

__all__ = ["BYTE_ORDER_MARK", "Row", "decode"]

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some editors put it at the start of a UTF-8 file."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file. JSON lines stay bytes until they are asked for, so that workers parse them."""

    file: str
    line: int | None
    """From 1; None where the file has no lines."""
    number: int
    """In its source, from 0."""
    content: bytes | Mapping[str, Any]

    def columns(self) -> Mapping[str, Any]:
        """The row's columns. Raises `UserError` with file and line for a line that is no JSON object."""
        if not isinstance(self.content, bytes):
            return self.content
        text = decode(self.content, self.file, self.line)
        try:
            columns = json.loads(text)
        except (ValueError, RecursionError) as error:
            problem = "its numbers are too long" if type(error) is ValueError else str(error)
            if isinstance(error, json.JSONDecodeError):
                problem = f"{error.msg.removesuffix(' at')} at column {error.colno}"
            raise self.error(f"the line is not valid JSON, or cut off ({problem}); repair it.") from error
        return self._checked(columns)

    def holding(self, value: Any) -> Row:
        """This row with `value` as its columns. Raises `UserError` with file and line when it is no object."""
        return replace(self, content=self._checked(value))

    def error(self, message: str) -> UserError:
        """`message` as an error at this row's place."""
        where = "" if self.line is not None else f"in row {self.number + 1}, "
        return UserError(where + message, file=self.file, line=self.line)

    def _checked(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(f"the row must be an object with named columns, not {json.dumps(value):.40}.")
        return value


def decode(content: bytes, name: str, line: int | None) -> str:
    """`content` as UTF-8: the line `line` of the file `name`, or with None the whole of it.

    Raises `UserError` with file and line of the first byte that is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        at = (line or 1) + content.count(b"\n", 0, error.start)
        raise UserError(
            "the line holds bytes that are not UTF-8; save the file as UTF-8.", file=name, line=at
        ) from error
