"""What a process tells of itself once a second, in a file of the run directory. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from understudy.launch.run_directory import replace_file

__all__ = ["LOADING", "MEETING", "PHASES", "PROVING", "SAVING", "STARTING", "TRAINING", "Collective", "Pulse"]
__all__ += ["beat_seconds", "read_pulse", "write_pulse"]

BEATS_A_SECOND = 100
"""At most, of all processes: on a disk that hosts share each is work for its server."""

STARTING, MEETING, LOADING, TRAINING, SAVING, PROVING = PHASES = (
    "starting",
    "meeting the others",
    "loading the model",
    "training",
    "saving the model",
    "proving the model",
)
"""Of a process, in order."""


@dataclass(frozen=True)
class Collective:
    """One that a process has entered."""

    group: str
    """Backend and name, such as `gloo:0`."""
    number: int
    """Of those of its group, from 1."""
    name: str
    sizes: tuple[tuple[int, ...], ...]
    done: bool

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Collective:
        """From JSON."""
        return cls(**{**told, "sizes": tuple(map(tuple, told["sizes"]))})


@dataclass(frozen=True)
class Pulse:
    """What a process tells."""

    rank: int
    host: str
    process: int
    beat: int
    phase: str
    """One of `PHASES`."""
    step: int | None
    """Optimizer steps done; None before the first."""
    marks: int
    """How often it got on: began a micro-batch, generated a token, wrote a tensor."""
    collectives: tuple[Collective, ...]
    """The last of each group; empty where this PyTorch does not tell."""
    time_seconds: float = 0.0
    """Of this pulse, since the epoch, by rank 0's clock."""
    step_seconds: float | None = None
    """That the last step took; None before one is done."""
    entered: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    """By group: the number of each of the last collectives of steps, and when this process entered it, in microseconds
    since the epoch by rank 0's clock."""


def beat_seconds(world_size: int) -> float:
    """Between two pulses of a process."""
    return max(1.0, world_size / BEATS_A_SECOND)


def write_pulse(path: Path, pulse: Pulse) -> None:
    """Whole or not at all."""
    replace_file(path, json.dumps(asdict(pulse)).encode())


def read_pulse(path: Path) -> Pulse | None:
    """None where there is none: the process has not begun, or has ended."""
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    collectives = tuple(map(Collective.of, told["collectives"]))
    entered = {group: tuple(map(tuple, times)) for group, times in told["entered"].items()}
    return Pulse(**{**told, "collectives": collectives, "entered": entered})
