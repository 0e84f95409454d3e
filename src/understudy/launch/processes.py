"""Runs processes on this host and watches them: when one fails, all are stopped. Imports no torch."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

from understudy.launch.cause import Exit, FailedRunError, first_failure, read_cause
from understudy.launch.launcher import NodeCommand
from understudy.launch.run_directory import RunDirectory
from understudy.recipe.environment import CONSOLE_VARIABLE, LAUNCHER_VARIABLE, child_environment

__all__ = ["run_processes"]

POLL_SECONDS = 0.05
SETTLE_SECONDS = 0.3
"""From the first failure until the others are stopped: time for the true cause, seen second, to be seen."""
GRACE_SECONDS = 10.0
"""From SIGTERM to SIGKILL."""
CAUSE_BYTES = 64 * 2**10
"""A disk with less room free may not have taken the cause that a process left."""
STDOUT = 1


def run_processes(commands: Sequence[NodeCommand], directory: RunDirectory, *, console: bool = True) -> None:
    """Runs `commands` until all have ended with 0. Each one's output goes to its log; with `console`, rank 0 gets our
    stdout too.

    Each process leads a session of its own, so that a Ctrl-C reaches only us and its children can be stopped with it.
    Raises what `first_failure` finds, or `FailedRunError` with status 1 when we got SIGINT or SIGTERM.
    """
    directory.logs.mkdir(exist_ok=True)
    with _noted_signals() as received:
        started: list[subprocess.Popen[bytes]] = []
        try:
            for command in commands:
                started.append(_start(command, directory, console=console and command.rank == 0))
            exits = _watch(started, received)
        finally:
            _stop(started)
            if any(process.returncode for process in started):
                _restore_terminal()
    if received:
        raise FailedRunError(f"stopped by {received[0].name}", exit_status=1)
    if any(end.status != 0 for end in exits):
        ranks = range(len(commands))
        causes = {rank: cause for rank in ranks if (cause := read_cause(directory.cause(rank)))}
        if not causes and shutil.disk_usage(directory.path).free < CAUSE_BYTES:
            message = f"{directory.path}: no space is left on the disk; free some, or choose another output_dir."
            trained = directory.metrics.exists() and directory.metrics.stat().st_size > 0
            raise FailedRunError(message, 2, refused=not trained)
        raise first_failure(exits, causes, {rank: directory.log(rank) for rank in ranks})


def _start(command: NodeCommand, directory: RunDirectory, *, console: bool) -> subprocess.Popen[bytes]:
    with ExitStack() as stack:
        log = stack.enter_context(directory.log(command.rank).open("ab"))
        environment = {**command.environment, LAUNCHER_VARIABLE: str(os.getpid())}
        passed: tuple[int, ...] = ()
        if console:
            descriptor = os.dup(STDOUT)
            stack.callback(os.close, descriptor)
            passed = (descriptor,)
            environment[CONSOLE_VARIABLE] = str(descriptor)
        return subprocess.Popen(
            command.arguments,
            env=child_environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=passed,
            start_new_session=True,
        )


def _watch(started: Sequence[subprocess.Popen[bytes]], received: Sequence[signal.Signals]) -> list[Exit]:
    """Waits until all have ended, one has failed, or a signal came. Returns the ends seen."""
    seen: dict[int, Exit] = {}
    stop_at: float | None = None
    while not received and len(seen) < len(started):
        for rank, process in enumerate(started):
            if rank not in seen and (status := process.poll()) is not None:
                seen[rank] = Exit(rank, status, time.time())
                if status != 0 and stop_at is None:
                    stop_at = time.monotonic() + SETTLE_SECONDS
        if stop_at is not None and time.monotonic() >= stop_at:
            break
        time.sleep(POLL_SECONDS)
    return list(seen.values())


def _stop(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends what still runs, their children included: asked first, killed after a grace."""
    for process in started:
        if process.poll() is None:
            _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for process in started:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in started:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _restore_terminal() -> None:
    """A process that was stopped may have left a progress bar on the console, and the cursor hidden."""
    if os.isatty(STDOUT):
        os.write(STDOUT, b"\n\x1b[?25h")


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextmanager
def _noted_signals() -> Iterator[list[signal.Signals]]:
    """While inside, SIGINT and SIGTERM are put on the list that it gives, and do nothing else."""
    received: list[signal.Signals] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
