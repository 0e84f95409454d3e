"""Processes that ask a teacher for long: started together, stopped on request, gone on with by the same command.

They need nothing of each other, so there is no process group: one that ends, or is killed, leaves the others alone, and
what it had kept stays.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from understudy.errors import LostProcessError, StoppedError, UserError
from understudy.launch.cause import FailedRunError, write_cause
from understudy.launch.local import launch_local
from understudy.launch.parent import die_with_parent
from understudy.launch.run_directory import RunDirectory
from understudy.launch.signals import SIGNALS, StopRequests, noted_signals
from understudy.plan.machine import Machine
from understudy.recipe.environment import (
    ProcessEnvironment,
    console_descriptor,
    launcher_process,
    process_environment,
)
from understudy.training.console import Console, duration, open_console, silent_console
from understudy.training.failure import StepNote, ending_on_failure

__all__ = [
    "Pace",
    "TeacherProcess",
    "process_directory",
    "run_teacher_processes",
    "stopping_on_request",
    "teacher_process",
]

SECONDS_BETWEEN_LINES = 10.0
AGAIN = "run the same command again to go on"


@contextmanager
def stopping_on_request() -> Iterator[StopRequests]:
    """Around all that the command does: a request to stop ends it with a `StoppedError` that says how to go on. What is
    slow and can be left at any instant belongs into `interruptible` of what this gives."""
    with noted_signals() as requests:
        try:
            yield requests
        except (StoppedError, FailedRunError) as error:
            if isinstance(error, FailedRunError) and len(requests.received) < 2:  # else it was killed as it was asked
                raise
            by = f" by {requests}" if requests.received else ""
            raise StoppedError(f"stopped{by}; {AGAIN}.") from error
        except LostProcessError as error:
            raise LostProcessError(f"{error}; {AGAIN}") from error


@contextmanager
def process_directory() -> Iterator[RunDirectory]:
    """Where processes find what they are to do, and leave their logs; gone afterwards, unless a failure names one."""
    directory = RunDirectory(Path(tempfile.mkdtemp(prefix="understudy-teacher-")))
    kept = False
    try:
        directory.logs.mkdir()
        yield directory
    except (FailedRunError, LostProcessError) as error:
        kept = error.exit_status != UserError.exit_status
        raise
    finally:
        if not kept:
            shutil.rmtree(directory.path, ignore_errors=True)


def run_teacher_processes(module: str, processes: int, machine: Machine, directory: RunDirectory) -> None:
    """Runs `python -m module DIRECTORY` in `processes` processes on this host. Raises as `launch_local`."""
    arguments = (sys.executable, "-m", module, str(directory.path))
    launch_local(arguments, processes, directory, machine.cores, accelerated=machine.accelerated)


@dataclass(frozen=True)
class TeacherProcess:
    """One of these processes, seen from inside."""

    environment: ProcessEnvironment
    directory: RunDirectory
    console: Console
    requests: StopRequests


@contextmanager
def teacher_process() -> Iterator[TeacherProcess]:
    """Around all that a process does that `run_teacher_processes` started; a failure inside ends it with its cause
    left behind."""
    if (launcher := launcher_process()) is not None:
        die_with_parent(launcher)
    directory, environment = RunDirectory(Path(sys.argv[1])), process_environment()
    assert environment is not None, "a launcher sets RANK and WORLD_SIZE"
    descriptor = console_descriptor()
    console = silent_console() if descriptor is None else open_console(descriptor)
    report = partial(write_cause, directory.cause(environment.rank))
    with ending_on_failure(environment.rank, StepNote(), report), noted_signals() as requests:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # as its parent left them while it started
        yield TeacherProcess(environment, directory, console, requests)


class Pace:
    """Says how far the work of rank 0 is, now and then: the others do as much."""

    def __init__(self, process: TeacherProcess, what: str, total: int) -> None:
        self._console = process.console
        self._processes = process.environment.world_size
        self._what = what
        self._total = total
        self._done = self._tokens = 0
        self._began = self._said = time.monotonic()

    def advance(self, done: int, tokens: int) -> None:
        """So much more of what there is, in which there were so many tokens, is done."""
        self._done += done
        self._tokens += tokens
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES and self._done < self._total:
            return
        self._said, seconds = now, max(now - self._began, 1e-9)
        left = seconds * (self._total - self._done) / self._done
        self._console.say(
            f"{self._what} {self._done:,} of {self._total:,} a process, "
            f"{self._tokens * self._processes / seconds:,.0f} tokens/s, {duration(left)} left"
        )
