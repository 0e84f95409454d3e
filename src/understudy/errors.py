"""Failures that a user meets, each with the exit status it ends the program with."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DivergedError",
    "LostHostError",
    "LostProcessError",
    "LostTeacherError",
    "OutOfMemoryError",
    "RecipeError",
    "StoppedError",
    "StoppedWaitingError",
    "UnderstudyError",
    "UserError",
    "Violation",
    "is_full_disk",
    "is_out_of_memory",
    "tells_out_of_memory",
]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_MEMORY = re.compile(
    r"out of memory"  # CUDA, HIP and NPU, through PyTorch or a collective library; GNU OpenMP
    r"|can(?:'t|not) allocate memory"  # PyTorch's CPU allocator; the system's ENOMEM in words
    r"|bad_alloc"  # C++
    r"|memory allocation of \d+ bytes failed"  # Rust
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|ACL_ERROR_RT_MEMORY_ALLOCATION|EL0004"  # CANN
    r"|could not create a (?:memory object|primitive(?! descriptor))",  # oneDNN
    re.IGNORECASE,
)


class UnderstudyError(Exception):
    """A failure whose message is a sentence for the user; `exit_status` is what the process then ends with."""

    exit_status = 1


class UserError(UnderstudyError):
    """Wrong input. `message` says what is wrong and what to do; `file` and `line` (from 1) say where, when known.

    `key` is the recipe's key that is to blame, where only the raiser knows it and only the catcher knows its line.
    """

    exit_status = 2

    def __init__(
        self, message: str, *, file: str | Path | None = None, line: int | None = None, key: str | None = None
    ) -> None:
        self.message = message
        self.file = None if file is None else str(file)
        self.line = line
        self.key = key
        super().__init__(message)

    def __str__(self) -> str:
        return _one_line(self.message, self.file, self.line)


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong with a recipe. `key` is its dotted path, such as `data.train.0.path`."""

    key: str
    message: str
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        return _one_line(self.message, self.file, self.line)


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


class LostHostError(LostProcessError):
    """A host of several no longer answers the others; the message names it."""


class LostTeacherError(LostProcessError):
    """A server that teaches does not answer. Raised on all ranks alike, where no step is under way."""


class StoppedError(UnderstudyError):
    """Stopped on request; run again to go on.

    `begun`: training had begun, so the run directory has something to keep.
    """

    exit_status = 75

    def __init__(self, message: str, *, begun: bool = True) -> None:
        super().__init__(message)
        self.begun = begun


class StoppedWaitingError(StoppedError):
    """Stopped on request while a step waited to begin. Raised on all ranks alike; the message names the signal."""


def _one_line(message: str, file: str | None, line: int | None) -> str:
    """Place and message. What a user's names and values bring along must not break the line or steer the terminal."""
    where = "" if file is None else file if line is None else f"{file}:{line}"
    text = f"{where}: {message}" if where else message
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_full_disk(error: BaseException) -> bool:
    """Whether `error` says that no space, or no quota, is left on a disk."""
    # safetensors, written in Rust, reports the system's error as text only.
    return (isinstance(error, OSError) and error.errno in _FULL) or "No space left on device (os error 28)" in str(
        error
    )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` says that a device or the host had no memory left, itself or by what it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # Not by type: PyTorch's, by the same name, is not imported here.
        named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
        told = not isinstance(error, UnderstudyError) and tells_out_of_memory(str(error))
        if named or told or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def tells_out_of_memory(text: str) -> bool:
    """Whether a message, or what a process printed before it ended, says that there was no memory left."""
    return _NO_MEMORY.search(text) is not None
