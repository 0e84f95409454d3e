"""Why a run failed: the file a failing process leaves, and which of several failures came first. Imports no torch.

When one process fails its peers fail after it, blocked in a collective; their failures say nothing. So each process
writes its cause before it lets go of its connections, and the launcher looks for the first one.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType

from understudy.errors import LostHostError, LostProcessError, OutOfMemoryError, UnderstudyError, UserError
from understudy.launch.pulses import PHASES, TRAINING, Collective, Pulse
from understudy.launch.run_directory import replace_file

__all__ = [
    "Cause",
    "Exit",
    "FailedRunError",
    "HangError",
    "Misfit",
    "MisfitError",
    "ShortOfMemoryError",
    "Shortage",
    "Standing",
    "failure_of",
    "first_failure",
    "read_cause",
    "shortage_of",
    "standing_of",
    "write_cause",
]


class Standing(IntEnum):
    """How near a failure is to the one that all others follow from: the least of several is the nearest."""

    OWN = 0
    ABORTED = 1
    """A process called abort(), for a fault of its own, or because a library of it lost its peers."""
    PEER_FAILED = 2
    """A collective failed under a process: most likely another one is the cause."""
    HEARD = 3
    """It was ended because another host told of a failure, or was missed."""


@dataclass(frozen=True)
class Cause:
    """What a failing process knows of its failure."""

    rank: int
    host: str
    time_seconds: float
    """Seconds since the epoch."""
    exit_status: int
    message: str
    """A sentence for the user."""
    step: int | None
    """Optimizer steps done; None before training."""
    traceback: str
    peer_failed: bool
    """A collective failed under it: most likely another process is the cause. Where none is, a connection was lost."""
    micro_batch_tokens: int | None = None
    """Tokens of the largest micro-batch of the step or evaluation that it was at, or had done last."""
    shortage: str | None = None
    """What came of it that it ran out of memory, in words that follow its name; None where it failed otherwise."""
    collectives: tuple[Collective, ...] = ()
    """The last that it entered of each group, the latest at the end."""

    @property
    def refused(self) -> bool:
        """The input was wrong and that came out before training, so the run has nothing to keep."""
        return self.exit_status == 2 and self.step is None


@dataclass(frozen=True)
class Exit:
    """How a process ended: `status` is negative for a signal, as in `subprocess`."""

    rank: int
    host: str
    status: int
    time_seconds: float
    pulse: Pulse | None = None
    """Its last, where it has not taken it away, as it does when it is done."""

    @property
    def well(self) -> bool:
        """Whether it was done. One that something ended in its midst can have status 0 too."""
        return self.status == 0 and self.pulse is None


@dataclass(frozen=True)
class Shortage:
    """That a process ran out of memory."""

    rank: int
    host: str
    step: int | None
    """Optimizer steps done; None before training, and where nobody knows."""
    may_have_trained: bool
    """A micro-batch may be what took the memory."""
    micro_batch_tokens: int | None
    """Tokens of the largest that any process had then; None where nobody knows."""
    what: str
    """In words that follow the process's name."""
    log: Path
    last_collectives: str = ""
    """The one that each rank was in, in words; empty where that is not known."""

    def __str__(self) -> str:
        when = "" if self.step is None else f" after step {self.step}"
        return f"{_name(self)} {self.what}{when or (' before training' if not self.may_have_trained else '')}"


class FailedRunError(UnderstudyError):
    """A process of the run failed; carries that process's message and exit status."""

    def __init__(
        self, message: str, exit_status: int, *, refused: bool = False, standing: Standing = Standing.OWN
    ) -> None:
        """`refused`: as in `Cause`."""
        super().__init__(message)
        self.exit_status = exit_status
        self.refused = refused
        self.standing = standing


class ShortOfMemoryError(FailedRunError):
    """A process of the run ran out of memory."""

    def __init__(self, message: str, shortage: Shortage) -> None:
        super().__init__(message, OutOfMemoryError.exit_status)
        self.shortage = shortage


class HangError(LostProcessError):
    """No process got on; the message tells the last collective of each rank too, as it was when that was found: they
    may go on from there before they are killed."""


@dataclass(frozen=True)
class Misfit:
    """That a process got more bytes from a peer than its collective takes, for which gloo ends it."""

    name: str
    """Of the process."""
    got_bytes: int
    expected_bytes: int
    log: str

    def __str__(self) -> str:
        return (
            f"{self.name} got {self.got_bytes:,} bytes where its collective takes {self.expected_bytes:,} (its output "
            f"is in {self.log})"
        )


class MisfitError(FailedRunError):
    """Processes of the run were not in the same collective."""

    def __init__(self, misfits: Sequence[Misfit], others: Sequence[str] = ()) -> None:
        """`others` are the processes that went another way, as far as that is known."""
        who = " and ".join(others) or "a rank"
        super().__init__(
            f"{who} skipped a collective, or entered another one than the others: {', '.join(map(str, misfits))}",
            1,
            standing=Standing.ABORTED,
        )
        self.misfits = tuple(misfits)


def write_cause(path: Path, cause: Cause) -> None:
    """Writes `path` whole or not at all: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(asdict(cause), indent=1).encode())


def read_cause(path: Path) -> Cause | None:
    """The cause at `path`; None when the process left none that can be read: a disk may have lost part of it."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Cause(**{**told, "collectives": tuple(map(Collective.of, told["collectives"]))})


def first_failure(
    exits: Sequence[Exit],
    causes: Mapping[int, Cause],
    logs: Mapping[int, Path],
    starved: Mapping[int, str] = MappingProxyType({}),
    misfits: Mapping[int, Misfit] = MappingProxyType({}),
    reached: int | None = None,
) -> UnderstudyError:
    """The failure that the others follow from.

    `exits` are the processes that ended by themselves, `causes` what was left by any, `logs` where each one printed.
    Of those that vanished, `starved` ran out of memory: what came of it, in words; `misfits` tells of others; `reached`
    is the last step that processes which trained are known to have done. That of the least standing wins, of several
    the earliest; so a process that vanished without a word outranks peers that only saw a collective fail.
    """
    candidates: list[tuple[float, int, UnderstudyError]] = [
        (cause.time_seconds, rank, failure_of(cause, logs[rank], causes)) for rank, cause in causes.items()
    ]
    for end in exits:
        if end.rank in misfits:
            candidates.append((end.time_seconds, end.rank, MisfitError([misfits[end.rank]])))
        elif not end.well and end.rank not in causes:
            error = _lost(end, logs[end.rank], causes, starved.get(end.rank), reached)
            candidates.append((end.time_seconds, end.rank, error))
    return min(candidates, key=lambda candidate: (standing_of(candidate[2]), *candidate[:2]))[2]


def standing_of(error: UnderstudyError) -> Standing:
    """Of any error that a run ends with."""
    if isinstance(error, FailedRunError):
        return error.standing
    return Standing.HEARD if isinstance(error, LostHostError) else Standing.OWN


def shortage_of(cause: Cause, log: Path, causes: Mapping[int, Cause]) -> Shortage | None:
    """That the process which left `cause` ran out of memory; None where it failed otherwise. `causes` are what it and
    its peers left, as far as they are known."""
    if cause.shortage is None:
        return None
    tokens = cause.micro_batch_tokens if cause.step is None else _most_tokens(causes)
    return Shortage(cause.rank, cause.host, cause.step, cause.step is not None, tokens, cause.shortage, log)


def failure_of(cause: Cause, log: Path, causes: Mapping[int, Cause] = MappingProxyType({})) -> FailedRunError:
    """The failure that the process which left `cause` means by it. `causes` are what it and its peers left, as far as
    they are known."""
    if cause.refused:  # the sentence says it all, and is true of all
        return FailedRunError(cause.message, cause.exit_status, refused=True)
    when = "before training" if cause.step is None else f"after step {cause.step}"
    if cause.exit_status == UserError.exit_status:  # such as a disk that is full by now
        return FailedRunError(f"{cause.message.rstrip('.')} ({_name(cause)}, {when}).", cause.exit_status)
    message = f"{cause.message} ({_name(cause)}, {when}; traceback in {log})"
    if cause.peer_failed:
        message = f"a connection between ranks was lost, and none of them failed before: {message}"
        return FailedRunError(message, cause.exit_status, standing=Standing.PEER_FAILED)
    shortage = shortage_of(cause, log, causes)
    if shortage is not None:
        return ShortOfMemoryError(message, shortage)
    return FailedRunError(message, cause.exit_status)


def _lost(
    end: Exit, log: Path, causes: Mapping[int, Cause], starved: str | None, reached: int | None
) -> UnderstudyError:
    # Its pulse may be of a second ago, and where peers say that they were, it was too.
    steps = [None if end.pulse is None else end.pulse.step, *(cause.step for cause in causes.values())]
    if end.pulse is None or PHASES.index(end.pulse.phase) >= PHASES.index(TRAINING):
        steps.append(reached)
    step = max((step for step in steps if step is not None), default=None)
    if starved is not None:
        trained = step is not None or not causes  # of one that was alone nobody knows
        shortage = Shortage(end.rank, end.host, step, trained, _most_tokens(causes), starved, log)
        return ShortOfMemoryError(f"{_name(end)} {starved}; its output is in {log}", shortage)
    when = "" if end.pulse is None else f" while {end.pulse.phase}"
    when = when if step is None else f" after step {step}"
    if end.status >= 0:
        return LostProcessError(f"{_name(end)} ended with status {end.status}{when} without saying why; see {log}")
    name = signal.Signals(-end.status).name
    hint = " (most often the system ran out of memory)" if name == "SIGKILL" else ""
    message = f"{_name(end)} was killed by {name}{when}{hint}; its output is in {log}"
    if -end.status == signal.SIGABRT:
        return FailedRunError(message, LostProcessError.exit_status, standing=Standing.ABORTED)
    return LostProcessError(message)


def _name(told: Cause | Exit | Shortage) -> str:
    return f"rank {told.rank} on {told.host}"


def _most_tokens(causes: Mapping[int, Cause]) -> int | None:
    held = [cause.micro_batch_tokens for cause in causes.values() if cause.micro_batch_tokens is not None]
    return max(held, default=None)
