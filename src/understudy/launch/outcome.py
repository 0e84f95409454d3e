"""How the processes of one host ended, as its launcher tells the others, and which of several ends was first."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from understudy.errors import LostHostError, LostProcessError, StoppedError, UnderstudyError, UserError
from understudy.launch.cause import FailedRunError, Shortage, ShortOfMemoryError

__all__ = ["first_outcome", "told_outcome"]


def told_outcome(error: UnderstudyError | None, where: str = "") -> dict[str, Any] | None:
    """`error` as JSON has it, whose sentence begins with the host's name, `where`, unless it is about the input, a
    request or another host; None for processes that ended well."""
    if error is None:
        return None
    statuses = (UserError.exit_status, StoppedError.exit_status)
    about_all = error.exit_status in statuses or isinstance(error, LostHostError)
    shortage = None
    if isinstance(error, ShortOfMemoryError):
        shortage = {**asdict(error.shortage), "log": str(error.shortage.log)}
    return {
        "message": str(error) if about_all or not where else f"{where}: {error}",
        "status": error.exit_status,
        "refused": isinstance(error, FailedRunError) and error.refused,
        "secondary": isinstance(error, FailedRunError) and error.secondary,
        "begun": not isinstance(error, StoppedError) or error.begun,
        "shortage": shortage,
        "time_seconds": time.time(),
    }


def first_outcome(told: Mapping[int, dict[str, Any] | None], lost: UnderstudyError | None) -> UnderstudyError | None:
    """What the others follow from, of all that hosts told and of `lost`, the error of hosts that told nothing. None
    where all ended well."""
    failed = [outcome for outcome in told.values() if outcome is not None]
    if not failed:
        return lost
    first = min(failed, key=lambda outcome: (_rank(outcome), outcome["time_seconds"]))
    return lost if lost is not None and _rank(first) else _error(first)


def _rank(outcome: Mapping[str, Any]) -> int:
    """0 for a failure of its own, 1 for one that follows from another, 2 for a stop on request."""
    return 2 if outcome["status"] == StoppedError.exit_status else int(outcome["secondary"])


def _error(outcome: Mapping[str, Any]) -> UnderstudyError:
    message, status = outcome["message"], outcome["status"]
    if status == StoppedError.exit_status:
        return StoppedError(message, begun=outcome["begun"])
    if (shortage := outcome["shortage"]) is not None:
        return ShortOfMemoryError(message, Shortage(**{**shortage, "log": Path(shortage["log"])}))
    if status == LostProcessError.exit_status:
        return LostProcessError(message)
    return FailedRunError(message, status, refused=outcome["refused"], secondary=outcome["secondary"])
