"""Requests to stop: SIGINT, SIGTERM and SIGUSR1, noted instead of obeyed. Imports no torch.

A signal that ended a process anywhere would leave a run directory half begun. So it is only noted, and looked at where
stopping is safe; `interruptible` is for long work that writes nothing and that nobody looks up from.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from understudy.errors import StoppedError

__all__ = ["SIGNALS", "StopRequests", "check_stop_requests", "noted_signals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 0.2
"""`timeout` and job schedulers signal a process and then its whole group, so that it gets one request twice."""


class StopRequests:
    """What was asked of this process since `noted_signals` was entered."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        """In the order that they came in."""
        self._last_seconds = 0.0
        self._interrupts = False

    def __str__(self) -> str:
        return ", ".join(number.name for number in self.received)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises `StoppedError`, for a run that has not begun, as soon as a request comes, or at once for an earlier
        one; whatever else a request makes fail inside counts as that too."""
        try:
            self._interrupts = True
            self.check()
            yield
            self._interrupts = False
        except BaseException as error:
            self._interrupts = False
            if self.received and not isinstance(error, StoppedError):
                raise self.before_training() from error
            raise
        self.check()  # the interruption may have been caught by code that hides every exception

    def check(self) -> None:
        """Raises `StoppedError`, for a run that has not begun, when a request came."""
        if self.received:
            raise self.before_training()

    def before_training(self) -> StoppedError:
        """The error of a run that has not begun."""
        return StoppedError(f"stopped by {self} before training began; run again to train.", begun=False)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now, received = time.monotonic(), signal.Signals(number)
        repeated = self.received[-1:] == [received] and now - self._last_seconds < SAME_REQUEST_SECONDS
        self._last_seconds = now
        if not repeated:
            self.received.append(received)
            if self._interrupts:
                raise _InterruptionError


class _InterruptionError(BaseException):
    """Raised wherever the main thread is. No `Exception`: what handles failures must not take it for one."""


@contextmanager
def noted_signals() -> Iterator[StopRequests]:
    """While inside, SIGINT, SIGTERM and SIGUSR1 are noted, and do nothing else. Main thread only.

    Inside another `noted_signals` it gives the same requests, so none is lost on the way from one to the other.
    """
    if (enclosing := _enclosing()) is not None:
        yield enclosing
        return
    requests = StopRequests()
    before = {number: signal.signal(number, requests._note) for number in SIGNALS}
    try:
        yield requests
    # It came as `interruptible` was being left.
    except _InterruptionError as error:
        raise requests.before_training() from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_stop_requests() -> None:
    """Raises `StoppedError`, for a run that has not begun, when a request came; does nothing outside of
    `noted_signals`."""
    if (requests := _enclosing()) is not None:
        requests.check()


def _enclosing() -> StopRequests | None:
    handler = signal.getsignal(signal.SIGTERM)
    holder = getattr(handler, "__self__", None)
    return holder if isinstance(holder, StopRequests) else None
