"""TOML with the lines of its keys, as far as a scan of the text finds them. Imports no torch."""

from __future__ import annotations

import datetime
import re
import sys
from typing import Any

from understudy.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["parse_toml"]

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]#]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")


def parse_toml(text: str, file: str) -> tuple[Any, dict[str, int]]:
    """The value of a TOML text, and the line (from 1) of the dotted keys in it. Raises `UserError`."""
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at line (\d+), column \d+\)", str(error))
        message = str(error)[: found.start()] if found else str(error)
        # "at end of document" carries no number.
        line = int(found.group(1)) if found else text.count("\n") + 1
        raise UserError(f"not valid TOML: {message.lower()}; correct this line.", file=file, line=line) from error
    except RecursionError as error:
        raise UserError("mappings are nested too deeply to be a recipe.", file=file) from error
    except ValueError as error:  # int() refuses more than 4,300 digits, and does not say where
        raise UserError("a number in it has too many digits to be read; shorten it.", file=file) from error
    return _without_dates(value), _find_lines(text)


def _find_lines(text: str) -> dict[str, int]:
    """A key inside a multi-line text or an inline table is not told apart; its table's line is near enough."""
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _join("", header.group(2))
            if header.group(1) == "[[":
                index = counts[table] = counts.get(table, -1) + 1
                lines.setdefault(table, number)
                table = f"{table}.{index}"
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            lines.setdefault(_join(table, key.group(1)), number)
    return lines


def _join(table: str, dotted: str) -> str:
    parts = [part.strip("\"'") for part in _PART.findall(dotted)]
    return ".".join([*([table] if table else []), *parts])


def _without_dates(value: Any) -> Any:
    """Dates become text: no recipe field is a date, and text is what the other formats give."""
    if isinstance(value, dict):
        return {key: _without_dates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_dates(item) for item in value]
    return str(value) if isinstance(value, datetime.date | datetime.time) else value
