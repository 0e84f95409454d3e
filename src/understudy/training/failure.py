"""How a process of a run ends when it fails: it leaves its cause, then goes at once."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from understudy.errors import OutOfMemoryError, UnderstudyError, UserError, is_full_disk
from understudy.launch.cause import Cause
from understudy.training.hooks import Hook, StepResult, TrainingState

__all__ = ["StepNote", "cause_of", "ending_on_failure"]


class StepNote(Hook):
    """Remembers how far training is, for a failure to tell."""

    step: int | None = None

    def start(self, state: TrainingState) -> None:
        self.step = state.step

    def after_step(self, result: StepResult) -> None:
        self.step = result.state.step


@contextmanager
def ending_on_failure(rank: int, note: StepNote, report: Callable[[Cause], None]) -> Iterator[None]:
    """On an exception: prints the traceback to stderr (a log), reports the cause, and ends the process with its exit
    status.

    It is reported while this process still holds its connections, so before any peer can see it fail. Nothing is torn
    down: peers may be blocked, and leaving a process group that is broken can hang or abort.
    """
    try:
        yield
    # Nothing is hidden: the cause goes to the launcher and the traceback to the log.
    except Exception as error:  # noqa: BLE001
        cause = cause_of(error, rank, note.step)
        # A disk that is full takes neither log nor cause; the exit status must get out all the same.
        with suppress(OSError):
            sys.stderr.write(cause.traceback)
            sys.stderr.flush()
            sys.stdout.flush()
        with suppress(OSError):
            report(cause)
        os._exit(cause.exit_status)


def cause_of(error: Exception, rank: int, step: int | None) -> Cause:
    """What `error` means for the user and for the exit status."""
    if isinstance(error, torch.OutOfMemoryError):
        known: UnderstudyError | None = OutOfMemoryError(
            f"the device ran out of memory ({_first_line(error)}); lower training.micro_batch_tokens or "
            "data.max_length, set training.activation_checkpointing=full, or take a strategy that shards or offloads "
            "more, such as fsdp-offload or zero3-offload."
        )
    elif is_full_disk(error):
        where = getattr(error, "filename", None) or "the run"
        known = UserError(f"{where}: no space is left on the disk; free some, or choose another output_dir.")
    else:
        known = error if isinstance(error, UnderstudyError) else None
    return Cause(
        rank=rank,
        time_seconds=time.time(),
        exit_status=1 if known is None else known.exit_status,
        message=f"{type(error).__name__}: {_first_line(error)}" if known is None else str(known),
        step=step,
        traceback="".join(traceback.format_exception(error)),
        peer_failed=_is_collective_failure(error),
    )


def _is_collective_failure(error: Exception) -> bool:
    # gloo's failures have no type of their own, but name its source files.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
