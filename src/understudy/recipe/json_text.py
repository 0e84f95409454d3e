"""JSON with the line of every key; duplicate keys are refused. Imports no torch."""

from __future__ import annotations

import json
import re
from typing import Any

from understudy.errors import UserError

__all__ = ["parse_json"]

_SPACE = re.compile(r"[ \t\r\n]*")


def parse_json(text: str, file: str) -> tuple[Any, dict[str, int]]:
    """The value of a JSON text, and the line (from 1) of each dotted key in it. Raises `UserError`."""
    try:
        value = json.loads(text)
        lines: dict[str, int] = {}
        _Scanner(text, file, lines).scan(0, "")
    except json.JSONDecodeError as error:
        problem = error.msg.lower().removesuffix(" at")
        message = f"not valid JSON: {problem} at column {error.colno}; correct this line."
        raise UserError(message, file=file, line=error.lineno) from error
    except RecursionError as error:
        raise UserError("mappings are nested too deeply to be read.", file=file) from error
    except ValueError as error:  # int() refuses more than 4,300 digits, and does not say where
        raise UserError("a number in it has too many digits to be read; shorten it.", file=file) from error
    return value, lines


class _Scanner:
    """Walks a text that is known to be valid JSON and notes where each key begins."""

    def __init__(self, text: str, file: str, lines: dict[str, int]) -> None:
        self.text = text
        self.file = file
        self.lines = lines
        self.decoder = json.JSONDecoder()

    def scan(self, at: int, key: str) -> int:
        """Scans the value at or after `at`; returns the index just past it."""
        at = self._skip_space(at)
        if self.text[at] == "{":
            return self._members(at + 1, key)
        if self.text[at] == "[":
            return self._items(at + 1, key)
        return self.decoder.raw_decode(self.text, at)[1]

    def _members(self, at: int, key: str) -> int:
        seen: set[str] = set()
        while self.text[at := self._skip_space(at)] != "}":
            if self.text[at] == ",":
                at = self._skip_space(at + 1)
            line = self._line(at)
            name, at = self.decoder.raw_decode(self.text, at)
            child = f"{key}.{name}" if key else name
            if name in seen:
                message = f"the key `{name}` was given before, in line {self.lines[child]}; remove one of them."
                raise UserError(message, file=self.file, line=line)
            seen.add(name)
            self.lines[child] = line
            at = self.scan(self._skip_space(at) + 1, child)
        return at + 1

    def _items(self, at: int, key: str) -> int:
        index = 0
        while self.text[at := self._skip_space(at)] != "]":
            if self.text[at] == ",":
                at = self._skip_space(at + 1)
            child = f"{key}.{index}" if key else str(index)
            self.lines[child] = self._line(at)
            at = self.scan(at, child)
            index += 1
        return at + 1

    def _skip_space(self, at: int) -> int:
        found = _SPACE.match(self.text, at)
        return found.end() if found else at

    def _line(self, at: int) -> int:
        return self.text.count("\n", 0, at) + 1
