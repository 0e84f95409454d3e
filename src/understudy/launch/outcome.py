"""How the processes of one host ended, as its launcher tells the others, and which of several ends was first."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from understudy.errors import LostHostError, LostProcessError, StoppedError, UnderstudyError, UserError
from understudy.launch.cause import (
    FailedRunError,
    HangError,
    Misfit,
    MisfitError,
    Shortage,
    ShortOfMemoryError,
    Standing,
    standing_of,
)
from understudy.launch.last_collectives import LastCollective, in_words, other_ways, with_collectives

__all__ = ["first_outcome", "told_outcome"]


def told_outcome(error: UnderstudyError | None, last: Sequence[LastCollective] = ()) -> dict[str, Any] | None:
    """`error` as JSON has it, and the last collectives of this host's ranks; None for processes that ended well."""
    if error is None:
        return None
    shortage = None
    if isinstance(error, ShortOfMemoryError):
        shortage = {**asdict(error.shortage), "log": str(error.shortage.log)}
    return {
        "message": str(error),
        "status": error.exit_status,
        "refused": isinstance(error, FailedRunError) and error.refused,
        "standing": standing_of(error),
        "begun": not isinstance(error, StoppedError) or error.begun,
        "shortage": shortage,
        "misfits": list(map(asdict, error.misfits)) if isinstance(error, MisfitError) else [],
        "last_collectives": list(map(asdict, last)),
        "tells_them": isinstance(error, HangError),
        "time_seconds": time.time(),
    }


def first_outcome(
    told: Mapping[int, dict[str, Any] | None], lost: LostHostError | None, others: Sequence[LastCollective] = ()
) -> UnderstudyError | None:
    """What the others follow from, of all that hosts told and of `lost`, the error of hosts that told nothing, with the
    last collective that each rank was in; `others` are those of lost hosts' ranks. None where all ended well."""
    failed = [outcome for outcome in told.values() if outcome is not None]
    if not failed:
        return lost
    last = [LastCollective.of(one) for outcome in failed for one in outcome["last_collectives"]] + list(others)
    last.sort(key=lambda one: one.rank)
    # Clocks of hosts differ: time decides only between failures of the same standing.
    first = min(failed, key=lambda outcome: (_standing(outcome), outcome["time_seconds"]))
    # Which hosts are lost is known better by now than when the first was missed.
    if lost is not None and _standing(first) != Standing.OWN:
        return LostHostError(with_collectives(str(lost), last))
    if first["misfits"]:
        misfits = [Misfit(**one) for outcome in failed for one in outcome["misfits"]]
        error = MisfitError(misfits, other_ways(last, misfits))
        return FailedRunError(with_collectives(str(error), last), error.exit_status)
    return _error(first, last)


def _standing(outcome: Mapping[str, Any]) -> int:
    """A stop on request comes after all failures."""
    return max(Standing) + 1 if outcome["status"] == StoppedError.exit_status else int(outcome["standing"])


def _error(outcome: Mapping[str, Any], last: Sequence[LastCollective]) -> UnderstudyError:
    message, status = outcome["message"], outcome["status"]
    if status == StoppedError.exit_status:
        return StoppedError(message, begun=outcome["begun"])
    if status == UserError.exit_status:
        return FailedRunError(message, status, refused=outcome["refused"])
    if not outcome["tells_them"]:
        message = with_collectives(message, last)
    if (told := outcome["shortage"]) is not None:
        shortage = Shortage(**{**told, "log": Path(told["log"])})
        return ShortOfMemoryError(message, replace(shortage, last_collectives=in_words(last)))
    if status == LostProcessError.exit_status:
        return LostProcessError(message)
    return FailedRunError(message, status)
