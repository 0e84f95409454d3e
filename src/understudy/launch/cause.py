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
from types import MappingProxyType

from understudy.errors import LostProcessError, OutOfMemoryError, UnderstudyError

__all__ = [
    "Cause",
    "Exit",
    "FailedRunError",
    "ShortOfMemoryError",
    "Shortage",
    "first_failure",
    "read_cause",
    "shortage_of",
    "write_cause",
]


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
    micro_batch_tokens: int | None = None
    """Tokens of the largest micro-batch of the step or evaluation that it was at, or had done last."""
    shortage: str | None = None
    """What came of it that it ran out of memory, in words that follow its name; None where it failed otherwise."""

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


@dataclass(frozen=True)
class Shortage:
    """That a process ran out of memory."""

    rank: int
    step: int | None
    """Optimizer steps done; None before training, and where nobody knows."""
    may_have_trained: bool
    """A micro-batch may be what took the memory."""
    micro_batch_tokens: int | None
    """Tokens of the largest that any process had then; None where nobody knows."""
    what: str
    """In words that follow the process's name."""
    log: Path

    def __str__(self) -> str:
        when = "" if self.step is None else f" after step {self.step}"
        return f"rank {self.rank} {self.what}{when or (' before training' if not self.may_have_trained else '')}"


class FailedRunError(UnderstudyError):
    """A process of the run failed; carries that process's message and exit status."""

    def __init__(self, message: str, exit_status: int, *, refused: bool = False, secondary: bool = False) -> None:
        """`refused`: as in `Cause`. `secondary`: most likely it follows from another process's failure."""
        super().__init__(message)
        self.exit_status = exit_status
        self.refused = refused
        self.secondary = secondary


class ShortOfMemoryError(FailedRunError):
    """A process of the run ran out of memory."""

    def __init__(self, message: str, shortage: Shortage) -> None:
        super().__init__(message, OutOfMemoryError.exit_status)
        self.shortage = shortage


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


def first_failure(
    exits: Sequence[Exit],
    causes: Mapping[int, Cause],
    logs: Mapping[int, Path],
    starved: Mapping[int, str] = MappingProxyType({}),
) -> UnderstudyError:
    """The failure that the others follow from.

    `exits` are the processes that ended by themselves, `causes` what was left by any, `logs` where each one printed.
    Of those that vanished, `starved` ran out of memory: what came of it, in words. A process that vanished without a
    word outranks peers that only saw a collective fail; otherwise the earliest wins.
    """
    candidates: list[tuple[bool, float, int, UnderstudyError]] = [
        (cause.peer_failed, cause.time_seconds, rank, _failed(cause, logs[rank], causes))
        for rank, cause in causes.items()
    ]
    candidates += [
        (False, end.time_seconds, end.rank, _lost(end, logs[end.rank], causes, starved.get(end.rank)))
        for end in exits
        if end.status != 0 and end.rank not in causes
    ]
    return min(candidates, key=lambda candidate: candidate[:3])[3]


def shortage_of(cause: Cause, log: Path, causes: Mapping[int, Cause]) -> Shortage | None:
    """That the process which left `cause` ran out of memory; None where it failed otherwise. `causes` are what it and
    its peers left, as far as they are known."""
    if cause.shortage is None:
        return None
    tokens = cause.micro_batch_tokens if cause.step is None else _most_tokens(causes)
    return Shortage(cause.rank, cause.step, cause.step is not None, tokens, cause.shortage, log)


def _failed(cause: Cause, log: Path, causes: Mapping[int, Cause]) -> FailedRunError:
    if cause.exit_status == 2:  # wrong input: the sentence says it all
        return FailedRunError(cause.message, cause.exit_status, refused=cause.refused)
    when = "before training" if cause.step is None else f"after step {cause.step}"
    message = f"{cause.message} (rank {cause.rank}, {when}; traceback in {log})"
    shortage = shortage_of(cause, log, causes)
    if shortage is not None:
        return ShortOfMemoryError(message, shortage)
    return FailedRunError(message, cause.exit_status, secondary=cause.peer_failed)


def _lost(end: Exit, log: Path, causes: Mapping[int, Cause], starved: str | None) -> UnderstudyError:
    if starved is not None:
        steps = [cause.step for cause in causes.values()]
        step = max((step for step in steps if step is not None), default=None)
        trained = step is not None or not steps  # of one that was alone nobody knows
        shortage = Shortage(end.rank, step, trained, _most_tokens(causes), starved, log)
        return ShortOfMemoryError(f"rank {end.rank} {starved}; its output is in {log}", shortage)
    if end.status > 0:
        return LostProcessError(f"rank {end.rank} ended with status {end.status} without saying why; see {log}")
    name = signal.Signals(-end.status).name
    hint = " (most often the system ran out of memory)" if name == "SIGKILL" else ""
    return LostProcessError(f"rank {end.rank} was killed by {name}{hint}; its output is in {log}")


def _most_tokens(causes: Mapping[int, Cause]) -> int | None:
    held = [cause.micro_batch_tokens for cause in causes.values() if cause.micro_batch_tokens is not None]
    return max(held, default=None)
