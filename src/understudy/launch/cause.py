"""Why a run failed: the file a failing process leaves, and which of several failures came first. Imports no torch.

When one process fails its peers fail after it, blocked in a collective; their failures say nothing. So each process
writes its cause before it lets go of its connections, and the launcher looks for the first one.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from understudy.errors import LostProcessError, UnderstudyError

__all__ = ["Cause", "Exit", "FailedRunError", "first_failure", "read_cause", "write_cause"]


@dataclass(frozen=True)
class Cause:
    """What a failing process knows of its failure."""

    rank: int
    time_seconds: float
    """Seconds since the epoch."""
    exit_status: int
    message: str
    """A sentence for the user."""
    step: int | None
    """Optimizer steps done; None before training."""
    traceback: str
    peer_failed: bool
    """A collective failed under it: most likely another process is the cause."""

    @property
    def refused(self) -> bool:
        """The input was wrong and that came out before training, so the run has nothing to keep."""
        return self.exit_status == 2 and self.step is None


@dataclass(frozen=True)
class Exit:
    """How a process ended: `status` is negative for a signal, as in `subprocess`."""

    rank: int
    status: int
    time_seconds: float


class FailedRunError(UnderstudyError):
    """A process of the run failed; carries that process's message and exit status."""

    def __init__(self, message: str, exit_status: int, *, refused: bool = False) -> None:
        """`refused`: as in `Cause`."""
        super().__init__(message)
        self.exit_status = exit_status
        self.refused = refused


def write_cause(path: Path, cause: Cause) -> None:
    """Writes `path` whole or not at all: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(asdict(cause), indent=1), encoding="utf-8")
        partial.replace(path)
    except OSError:  # a full disk
        partial.unlink(missing_ok=True)
        raise


def read_cause(path: Path) -> Cause | None:
    """The cause at `path`; None when the process left none."""
    return Cause(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def first_failure(exits: Sequence[Exit], causes: Mapping[int, Cause], logs: Mapping[int, Path]) -> UnderstudyError:
    """The failure that the others follow from.

    `exits` are the processes that ended by themselves, `causes` what was left by any, `logs` where each one printed.
    A process that vanished without a word outranks peers that only saw a collective fail; otherwise the earliest wins.
    """
    candidates: list[tuple[bool, float, int, UnderstudyError]] = [
        (cause.peer_failed, cause.time_seconds, rank, _failed(cause, logs[rank])) for rank, cause in causes.items()
    ]
    candidates += [
        (False, end.time_seconds, end.rank, _lost(end, logs[end.rank]))
        for end in exits
        if end.status != 0 and end.rank not in causes
    ]
    return min(candidates, key=lambda candidate: candidate[:3])[3]


def _failed(cause: Cause, log: Path) -> FailedRunError:
    if cause.exit_status == 2:  # wrong input: the sentence says it all
        return FailedRunError(cause.message, cause.exit_status, refused=cause.refused)
    when = "before training" if cause.step is None else f"after step {cause.step}"
    return FailedRunError(f"{cause.message} (rank {cause.rank}, {when}; traceback in {log})", cause.exit_status)


def _lost(end: Exit, log: Path) -> LostProcessError:
    if end.status > 0:
        return LostProcessError(f"rank {end.rank} ended with status {end.status} without saying why; see {log}")
    name = signal.Signals(-end.status).name
    hint = " (most often the system ran out of memory)" if name == "SIGKILL" else ""
    return LostProcessError(f"rank {end.rank} was killed by {name}{hint}; its output is in {log}")
