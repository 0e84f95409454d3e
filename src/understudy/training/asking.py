"""A teacher far away is asked about a step while the step before computes, and no rank waits alone for its answer."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from understudy.contracts import Batch, GlobalBatch
from understudy.errors import LostTeacherError, StoppedWaitingError
from understudy.objectives.teachers.server_client import ServerError
from understudy.objectives.teachers.teacher import Teaching
from understudy.training.loop import Data
from understudy.training.stopping import StopRequest

__all__ = ["AgreedWaiting", "AskedData", "Asking", "make_asking"]

Answer = TypeVar("Answer")
Ask = Callable[[Sequence[Batch]], Sequence[Any]]
Answered = tuple[Batch, ...]

LOOK_UP_SECONDS = 1.0
"""Between two times that waiting ranks tell each other how they fare: a request to stop waits this much longer."""


class AgreedWaiting:
    """Has questions asked on a thread, and agrees with all ranks on what came of it.

    A rank that raised alone would leave its peers in a collective that never ends, so a failure of one is raised by
    all, and so is a request to stop that comes while any of them waits.
    """

    def __init__(self, stop: StopRequest, whom: str) -> None:
        """`whom` is who is asked, in words."""
        self._stop = stop
        self._whom = whom
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="asking")

    def begin(self, ask: Callable[[], Answer]) -> Future[Answer]:
        """No collective."""
        return self._thread.submit(ask)

    def wait(self, asked: Future[Answer]) -> Answer:
        """This rank's answer; a collective. Raises `LostTeacherError` when some rank got none, and
        `StoppedWaitingError` when some rank was asked to stop before all had theirs, on all ranks alike."""
        rank, size = dist.get_rank(), dist.get_world_size()
        while True:
            waits = not wait([asked], timeout=LOOK_UP_SECONDS).done
            failure = None if waits else _failure(asked)
            # Of ranks that failed the first counts most.
            states = torch.tensor([waits, size - rank if failure else 0, self._stop.received()])
            dist.all_reduce(states, op=dist.ReduceOp.MAX)
            waiting, failed, stopped = states.tolist()
            if failed:
                said = [failure]
                dist.broadcast_object_list(said, src=size - failed, device=torch.device("cpu"))
                raise LostTeacherError(f"{self._whom} cannot be asked: {said[0]}")
            if not waiting:
                return asked.result()
            if stopped:
                raise StoppedWaitingError(f"stopped by {signal.Signals(stopped).name}")


class Asking:
    """Asks a teacher about batches; all ranks wait together (`AgreedWaiting`)."""

    def __init__(self, ask: Ask, stop: StopRequest) -> None:
        self._ask = ask
        self._waiting = AgreedWaiting(stop, "the teacher")

    def begin(self, batches: Sequence[Batch]) -> Future[Answered]:
        """Asks about this rank's `batches`. No collective."""
        return self._waiting.begin(lambda: self._answered(batches))

    def wait(self, asked: Future[Answered]) -> Answered:
        """The batches with their answers; a collective. Raises as `AgreedWaiting.wait`."""
        return self._waiting.wait(asked)

    def answered(self, batches: Sequence[Batch]) -> Answered:
        """Asks, and waits; a collective."""
        return self.wait(self.begin(batches))

    def _answered(self, batches: Sequence[Batch]) -> Answered:
        return tuple(replace(batch, targets=told) for batch, told in zip(batches, self._ask(batches), strict=True))


class AskedData:
    """`data`, with what is said about its micro-batches in `Batch.targets`. The next step is asked about ahead, unless
    `data` has a method `known` and says that its batch is not known yet. `step` is a collective."""

    def __init__(self, data: Data, asking: Asking, total_steps: int) -> None:
        self._data = data
        self._asking = asking
        self._total_steps = total_steps
        self._known: Callable[[int], bool] = getattr(data, "known", lambda step: True)
        self._ahead: _Asked | None = None

    def step(self, step: int) -> GlobalBatch:
        asked = self._ahead if self._ahead is not None and self._ahead.step == step else self._begun(step)
        micro_batches = self._asking.wait(asked.micro_batches)
        more = step + 1 < self._total_steps and self._known(step + 1)
        self._ahead = self._begun(step + 1) if more else None
        return replace(asked.batch, micro_batches=micro_batches)

    def _begun(self, step: int) -> _Asked:
        batch = self._data.step(step)
        return _Asked(step, batch, self._asking.begin(batch.micro_batches))


class _Asked(NamedTuple):
    step: int
    batch: GlobalBatch
    micro_batches: Future[Answered]


def make_asking(teaching: Teaching | None, stop: StopRequest) -> Asking | None:
    """None where nobody is asked before the step."""
    return None if teaching is None or teaching.ask is None else Asking(teaching.ask, stop)


def _failure(asked: Future[Any]) -> str | None:
    """Why a teacher gave no answer. Raises any other failure: that is a mistake of ours."""
    error = asked.exception()
    if error is not None and not isinstance(error, ServerError):
        raise error
    return None if error is None else str(error)
