"""Stopping on request: signals are noted, and all ranks agree on the step after which to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from understudy.errors import LostTeacherError, StoppedError, StoppedWaitingError
from understudy.launch.signals import SIGNALS, StopRequests, noted_signals
from understudy.training.hooks import Hook, StepResult, TrainingState

__all__ = ["StopHook", "StopRequest"]


class StopRequest:
    """Whether any rank was asked to stop.

    Signals reach ranks at different times, in different steps, and a checkpoint needs all ranks at the same step. So
    each step ranks exchange what they got, one number over the host's network, while the step computes.
    """

    def __init__(self) -> None:
        self._requests = StopRequests()
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._exchange: dist.Work | None = None

    @contextmanager
    def noting_signals(self) -> Iterator[None]:
        """While inside, the signals do nothing but be noted. They may have been blocked until now, so that one which
        came while the process started is not lost."""
        with noted_signals() as self._requests:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            yield

    def received(self) -> int:
        """The number of the first signal that this rank received; 0 without any."""
        return self._requests.received[0] if self._requests.received else 0

    def exchange(self) -> None:
        """Begins to ask all ranks; a collective."""
        self._flag = torch.tensor([self.received()], dtype=torch.int32)
        self._exchange = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)

    def agreed(self) -> signal.Signals | None:
        """The signal that some rank had received when `exchange` was called: the same answer on all ranks."""
        assert self._exchange is not None, "exchange comes first"
        self._exchange.wait()
        number = int(self._flag)
        return signal.Signals(number) if number else None

    def settle(self) -> None:
        """Until no exchange is under way."""
        if self._exchange is not None:
            self._exchange.wait()


class StopHook(Hook):
    """For a run without checkpoints: raises `StoppedError` after the step in flight, on all ranks alike."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def before_step(self, state: TrainingState) -> None:
        self._stop.exchange()

    def after_step(self, result: StepResult) -> None:
        if (received := self._stop.agreed()) is not None:
            raise StoppedError(f"stopped by {received.name} after step {result.state.step}.")

    def interrupted(self, state: TrainingState, error: LostTeacherError | StoppedWaitingError) -> None:
        self._stop.settle()
        if isinstance(error, StoppedWaitingError):
            raise StoppedError(f"{error} after step {state.step}.") from error
