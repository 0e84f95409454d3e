"""Reads a whole JSON file row by row, keeping the line that each row starts on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from understudy.data.row import BYTE_ORDER_MARK, Row, decode
from understudy.errors import UserError

__all__ = ["read_json"]

_WRAPPED = re.compile(r'\s*\{\s*"(?:data|rows|examples|instances|train)"\s*:\s*(?=\[)')
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"\s*")


def read_json(name: str, content: bytes, first: int) -> Iterator[tuple[Row, float]]:
    """A list of objects, an object that holds just such a list, or objects one after another.

    Yields each row with the share of the file read once it is. Raises `UserError` with the line where it is no JSON.
    """
    text = decode(content.removeprefix(BYTE_ORDER_MARK), name, None)
    wrapped = _WRAPPED.match(text)
    at = wrapped.end() if wrapped else _skip(text, 0)
    if text.startswith("[", at):
        yield from _json_array(name, text, at, first, closing="}" if wrapped else "")
        return
    line, seen = 1, 0
    while at < len(text):
        line, seen = line + text.count("\n", seen, at), at
        row = Row(name, line, first, {})
        value, at = _value(name, text, at)
        yield row.holding(value), at / len(text)
        first += 1
        at = _skip(text, at)


def _json_array(name: str, text: str, at: int, first: int, closing: str) -> Iterator[tuple[Row, float]]:
    line, seen = 1, 0
    at = _skip(text, at + 1)
    if not text.startswith("]", at):
        while True:
            line, seen = line + text.count("\n", seen, at), at
            row = Row(name, line, first, {})
            value, at = _value(name, text, at)
            yield row.holding(value), at / len(text)
            first += 1
            at = _skip(text, at)
            if text.startswith("]", at):
                break
            if not text.startswith(",", at):
                raise _cut_off(name, text, at, "a comma or the closing bracket is missing")
            at = _skip(text, at + 1)
    at = _skip(text, at + 1)
    if closing and not text.startswith(closing, at):
        raise _cut_off(name, text, at, "the closing brace is missing")
    at = _skip(text, at + len(closing))
    if at < len(text):
        raise _cut_off(name, text, at, "more text follows the end of the list")


def _value(name: str, text: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _cut_off(name, text, error.pos, error.msg) from error
    except (ValueError, RecursionError) as error:
        problem = str(error) if isinstance(error, RecursionError) else "its numbers are too long"
        raise _cut_off(name, text, at, problem) from error


def _cut_off(name: str, text: str, at: int, problem: str) -> UserError:
    line = text.count("\n", 0, at) + 1
    ends = not text[at:].strip() or problem.startswith("Unterminated string")
    problem = problem.removesuffix(" starting at")
    what = "the file ends in the middle of its JSON" if ends else "the file is not valid JSON"
    return UserError(f"{what} ({problem}); repair it or fetch it again.", file=name, line=line)


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at
