"""How far each of several processes came, left in a file that outlives them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

__all__ = ["Outcome", "Progress", "Step", "read_progress"]


@dataclass(frozen=True)
class Step:
    """Something that one process did, or began to do."""

    rank: int
    name: str
    members: tuple[int, ...]
    """The ranks that do it together."""
    done: bool
    right: bool | None = None
    """Whether it came to what was expected; None where nothing was."""
    bytes_per_second: float | None = None


@dataclass
class Outcome:
    right: bool | None = None
    bytes_per_second: float | None = None


class Progress:
    """Notes what this process does. A line is out before the step begins, since it may never end."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._file = _file(directory, rank).open("a", encoding="utf-8", buffering=1)
        self._rank = rank

    @contextmanager
    def step(self, name: str, members: tuple[int, ...]) -> Iterator[Outcome]:
        """Around what `members` do together; what it came to is set on what this gives."""
        begun, outcome = Step(self._rank, name, members, done=False), Outcome()
        self._write(begun)
        yield outcome
        self._write(replace(begun, done=True, right=outcome.right, bytes_per_second=outcome.bytes_per_second))

    def _write(self, step: Step) -> None:
        self._file.write(json.dumps(asdict(step)) + "\n")


def read_progress(directory: Path, rank: int) -> list[Step]:
    """The last word on each step of the process, in order; none when it did not get to its first."""
    steps: dict[str, Step] = {}
    file = _file(directory, rank)
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        values = json.loads(line)
        step = Step(**{**values, "members": tuple(values["members"])})
        steps[step.name] = step
    return list(steps.values())


def _file(directory: Path, rank: int) -> Path:
    return directory / f"progress-{rank}.jsonl"
