"""How a process of a run ends when it fails: it leaves its cause, then goes at once."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch.distributed as dist

from understudy.contracts import Batch, GlobalBatch
from understudy.devices.host_memory import lift_data_limit
from understudy.errors import (
    LostProcessError,
    OutOfMemoryError,
    UnderstudyError,
    UserError,
    is_full_disk,
    is_out_of_memory,
)
from understudy.launch.cause import Cause
from understudy.launch.pulses import Collective
from understudy.recipe.environment import host_name
from understudy.training.hooks import Hook, StepResult, TrainingState
from understudy.training.loop import Data
from understudy.training.pulse import entered_collectives

__all__ = ["NotedData", "StepNote", "cause_of", "ending_on_failure"]

_SIZE = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]i?B)", re.IGNORECASE)
"""In the words of PyTorch's allocators."""


class StepNote(Hook):
    """Remembers how far training is and what it was at, for a failure to tell."""

    step: int | None = None
    micro_batch_tokens: int | None = None
    """Of the largest that this rank was given last."""

    def given(self, micro_batches: Sequence[Batch]) -> None:
        """What is to be computed next."""
        self.micro_batch_tokens = max((len(batch.tokens) for batch in micro_batches), default=0)

    def start(self, state: TrainingState) -> None:
        self.step = state.step

    def after_step(self, result: StepResult) -> None:
        self.step = result.state.step


class NotedData:
    """Steps of training, of each of which `note` is told as it begins."""

    def __init__(self, data: Data, note: StepNote) -> None:
        self._data = data
        self._note = note

    def step(self, step: int) -> GlobalBatch:
        batch = self._data.step(step)
        self._note.given(batch.micro_batches)
        return batch


@contextmanager
def ending_on_failure(rank: int, note: StepNote, report: Callable[[Cause], None]) -> Iterator[None]:
    """On an exception, sys.exit() of some library included: prints the traceback to stderr (a log), reports the cause,
    and ends the process with its exit status.

    It is reported while this process still holds its connections, so before any peer can see it fail. Nothing is torn
    down: peers may be blocked, and leaving a process group that is broken can hang or abort.
    """
    try:
        yield
    # Nothing is hidden: the cause goes to the launcher and the traceback to the log.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        if is_out_of_memory(error):
            lift_data_limit()  # or there might be no room left to say so
        cause = cause_of(error, rank, note.step, note.micro_batch_tokens, entered_collectives())
        # A disk that is full takes neither log nor cause; the exit status must get out all the same.
        with suppress(OSError):
            sys.stderr.write(cause.traceback)
            sys.stderr.flush()
            sys.stdout.flush()
        with suppress(OSError):
            report(cause)
        os._exit(cause.exit_status)


def cause_of(
    error: BaseException,
    rank: int,
    step: int | None,
    micro_batch_tokens: int | None = None,
    collectives: tuple[Collective, ...] = (),
) -> Cause:
    """What `error` means for the user and for the exit status."""
    starved = is_out_of_memory(error)
    if starved and not isinstance(error, OutOfMemoryError):
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
    peer_failed = not starved and _is_collective_failure(error)
    if peer_failed and collectives:
        # PyTorch's recorder takes one that failed for done.
        collectives = (*collectives[:-1], replace(collectives[-1], done=False))
    return Cause(
        rank=rank,
        host=host_name(),
        time_seconds=time.time(),
        exit_status=known.exit_status if known is not None else LostProcessError.exit_status if peer_failed else 1,
        message=f"{type(error).__name__}: {_without_advice(_first_line(error))}" if known is None else str(known),
        step=step,
        traceback="".join(traceback.format_exception(error)),
        peer_failed=peer_failed,
        micro_batch_tokens=micro_batch_tokens,
        shortage=_asked_for(error) if starved else None,
        collectives=collectives,
    )


def _asked_for(error: BaseException) -> str:
    """What a process that ran out of memory asked for, as far as `error` or what it was raised from tells."""
    size = None
    known: BaseException | None = error
    while known is not None and size is None:
        size = _SIZE.search(str(known))
        known = known.__cause__ or known.__context__
    if size is None:
        return f"ran out of memory ({_first_line(error):.120})"
    amount = f"{int(size[1]) / 2**20:,.0f} MiB" if size[2] == "bytes" else f"{size[1]} {size[2]}"
    return f"ran out of memory, asking for {amount},"


def _is_collective_failure(error: BaseException) -> bool:
    # gloo's failures have no type of their own, but name its source files.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _without_advice(message: str) -> str:
    """What gloo says, without its place in the source and its guesses."""
    found = re.match(r"(?:\[\S*gloo\S*\] )?(.*?)(?:\. This is typically caused by .*)?$", message)
    return message if found is None else found[1]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
