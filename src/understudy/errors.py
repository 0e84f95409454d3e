"""Failures that a user meets, each with the exit status it ends the program with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DivergedError",
    "LostProcessError",
    "OutOfMemoryError",
    "RecipeError",
    "UnderstudyError",
    "UserError",
    "Violation",
]


class UnderstudyError(Exception):
    """A failure whose message is a sentence for the user; `exit_status` is what the process then ends with."""

    exit_status = 1


class UserError(UnderstudyError):
    """Wrong input. `message` says what is wrong and what to do; `file` and `line` (from 1) say where, when known."""

    exit_status = 2

    def __init__(self, message: str, *, file: str | Path | None = None, line: int | None = None) -> None:
        self.message = message
        self.file = None if file is None else str(file)
        self.line = line
        super().__init__(message)

    def __str__(self) -> str:
        where = "" if self.file is None else self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.message}" if where else self.message


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong with a recipe. `key` is its dotted path, such as `data.train.0.path`."""

    key: str
    message: str
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        where = "" if self.file is None else self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.message}" if where else self.message


class RecipeError(UserError):
    """Every violation of a recipe at once; `str()` gives a line for each."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        first = self.violations[0]
        super().__init__(first.message, file=first.file, line=first.line)

    def __str__(self) -> str:
        return "\n".join(str(violation) for violation in self.violations)


class DivergedError(UnderstudyError):
    """The loss or the gradient was not finite on more steps in a row than allowed."""

    exit_status = 3


class OutOfMemoryError(UnderstudyError):
    """A device ran out of memory; the message says what would fit."""

    exit_status = 4


class LostProcessError(UnderstudyError):
    """A process or host died; the message names the rank and the cause."""

    exit_status = 5
