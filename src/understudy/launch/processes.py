"""Runs processes on this host and watches them: when one fails, all are stopped. Imports no torch.

A request to stop, which reaches only us, is passed on to every process, and then waited for: they end the step in
flight, commit a checkpoint and end with status 75.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress

from understudy.errors import LostProcessError, StoppedError, UnderstudyError, tells_out_of_memory
from understudy.launch.cause import (
    Cause,
    Exit,
    FailedRunError,
    HangError,
    Misfit,
    Standing,
    first_failure,
    read_cause,
    standing_of,
)
from understudy.launch.control_groups import oom_kills
from understudy.launch.launcher import NodeCommand
from understudy.launch.pulses import read_pulse
from understudy.launch.run_directory import RunDirectory
from understudy.launch.signals import SIGNALS, StopRequests, noted_signals
from understudy.recipe.environment import CONSOLE_VARIABLE, LAUNCHER_VARIABLE, child_environment, host_name

__all__ = ["Watcher", "run_processes"]

POLL_SECONDS = 0.05
SETTLE_SECONDS = 0.3
"""From the first failure until the others are killed: time for the true cause, seen second, to be seen. They are not
asked first: a request to stop would have them finish a step, in a collective that can never end."""
KILL_SECONDS = 5.0
"""For processes that were killed to be gone; those with much memory take a while."""
KILL_POLL_SECONDS = 0.01
"""They are gone at once as a rule, and who waits for the failure's sentence waits for this."""
CAUSE_BYTES = 64 * 2**10
"""A disk with less room free may not have taken the cause that a process left."""
LAST_WORDS_BYTES = 16 * 2**10
"""Of a log: enough for what a runtime says as it aborts, and little enough not to hold what training said before."""
_MISFIT = re.compile(r"op\.preamble\.length <= op\.nbytes\. (\d+) vs (\d+)")
"""In the words of gloo."""
STDOUT = 1
STOPPED = StoppedError.exit_status


Watcher = Callable[[], UnderstudyError | None]
"""Asked many times a second while processes run: what it returns is why they cannot go on, though none has ended."""


def run_processes(
    commands: Sequence[NodeCommand],
    directory: RunDirectory,
    *,
    console: bool = True,
    watchers: Sequence[Watcher] = (),
) -> None:
    """Runs `commands` until all are done, which is ended with 0 and no longer training, or one of `watchers` finds that
    they cannot be. Each one's output goes to its log; with `console`, rank 0 gets our stdout too.

    Each process leads a session of its own, so that a Ctrl-C reaches only us and its children can be stopped with it.
    SIGINT, SIGTERM and SIGUSR1 are passed on, once; after that it takes as long as the processes take, or
    until the second signal, which kills them.

    Raises what a watcher or else `first_failure` finds; `LostProcessError` when a process cannot even be killed;
    `StoppedError` when the processes stopped on request, whoever
    asked, or a request came before training began; `FailedRunError` with status 1 when they had to be killed.
    """
    directory.logs.mkdir(exist_ok=True)
    for command in commands:
        for file in (directory.cause(command.rank), directory.pulse(command.rank)):
            file.unlink(missing_ok=True)  # an earlier run's
    ranks = [command.rank for command in commands]
    words = _LastWords(directory, ranks)
    with noted_signals() as requests:
        started: dict[int, subprocess.Popen[bytes]] = {}
        exits: list[Exit] = []
        found: UnderstudyError | None = None
        left: list[int] = []
        try:
            for command in commands:
                requests.check()
                started[command.rank] = _start(command, directory, console=console and command.rank == 0)
            exits, found = _watch(started, requests, directory, watchers)
        finally:
            left = _kill(started)
            if any(process.returncode for process in started.values()):
                _restore_terminal()
    # What was found came before any failure, and may be what a process failed by.
    if found is not None and (standing_of(found) == Standing.OWN or all(end.well for end in exits)):
        error: UnderstudyError = found
    elif len(exits) < len(commands) or any(not end.well for end in exits):
        error = _outcome(exits, ranks, requests, directory, words)
    else:
        return
    if left:
        who = " and ".join(f"rank {rank} (process {started[rank].pid})" for rank in left)
        why = "does not end even when killed: its disk, its network or its device does not answer"
        kind = HangError if isinstance(error, HangError) else LostProcessError
        raise kind(f"{str(error).rstrip('.')}; {who} on {host_name()} {why}.") from error
    raise error


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
        # A process inherits what is blocked: a request that comes before it can note one waits until it can.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, blocked)
        return subprocess.Popen(
            command.arguments,
            env=child_environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=passed,
            start_new_session=True,
        )


def _watch(
    started: Mapping[int, subprocess.Popen[bytes]],
    requests: StopRequests,
    directory: RunDirectory,
    watchers: Sequence[Watcher],
) -> tuple[list[Exit], UnderstudyError | None]:
    """Waits until all have ended, one has failed, a watcher found something, or a second signal came; passes the first
    one on. Returns the ends seen, and what was found."""
    seen: dict[int, Exit] = {}
    found: UnderstudyError | None = None
    stop_at: float | None = None
    asked = False
    while len(seen) < len(started) and len(requests.received) < 2:
        if requests.received and not asked:
            asked = True
            for process in started.values():
                process.send_signal(requests.received[0])
        for rank, process in started.items():
            if rank not in seen and (status := process.poll()) is not None:
                seen[rank] = Exit(rank, host_name(), status, time.time(), read_pulse(directory.pulse(rank)))
                if stop_at is None and not _others_will_end(seen[rank], directory):
                    stop_at = time.monotonic() + SETTLE_SECONDS
        if stop_at is None:
            found = next((problem for watcher in watchers if (problem := watcher()) is not None), None)
            if found is not None:
                stop_at = time.monotonic() + SETTLE_SECONDS
        if stop_at is not None and time.monotonic() >= stop_at:
            break
        time.sleep(POLL_SECONDS)
    return list(seen.values()), found


def _others_will_end(end: Exit, directory: RunDirectory) -> bool:
    """Whether this end leaves its peers as they should be. They agree on a step to stop after; one that stopped before
    training agreed with nobody."""
    if end.status != STOPPED:
        return end.well
    cause = read_cause(directory.cause(end.rank))
    return cause is None or cause.step is not None


def _kill(started: Mapping[int, subprocess.Popen[bytes]]) -> list[int]:
    """Ends what still runs, their children included. Returns the ranks of those that do not end: what waits in the
    kernel for a disk or a device cannot be killed."""
    for process in started.values():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + KILL_SECONDS
    while left := [rank for rank, process in started.items() if process.poll() is None]:
        if time.monotonic() > deadline:
            return left
        time.sleep(KILL_POLL_SECONDS)
    return []


class _LastWords:
    """Tells of processes that vanished what came of them, by what they printed since this was made."""

    def __init__(self, directory: RunDirectory, ranks: Sequence[int]) -> None:
        self._logs = {rank: directory.log(rank) for rank in ranks}
        self._before = {rank: log.stat().st_size if log.exists() else 0 for rank, log in self._logs.items()}
        self._kills = oom_kills()

    def starved(self, exits: Sequence[Exit]) -> dict[int, str]:
        """Those of `exits` that did, and what came of it, in words."""
        kills = oom_kills()
        killed = kills is not None and self._kills is not None and kills > self._kills
        found = {}
        for end in exits:
            if -end.status == signal.SIGKILL and killed:
                found[end.rank] = "was killed by the system, which had no memory left,"
            elif tells_out_of_memory(self._printed(end.rank)):
                found[end.rank] = "ended for want of memory"
        return found

    def misfits(self, exits: Sequence[Exit]) -> dict[int, Misfit]:
        """Those of `exits` that gloo ended because a peer was in another collective."""
        found = {}
        for end in exits:
            if -end.status == signal.SIGABRT and (sizes := _MISFIT.search(self._printed(end.rank))):
                log = str(self._logs[end.rank])
                found[end.rank] = Misfit(f"rank {end.rank} on {end.host}", int(sizes[1]), int(sizes[2]), log)
        return found

    def _printed(self, rank: int) -> str:
        """The last that it printed since this watch began."""
        try:
            with self._logs[rank].open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._before[rank], end - LAST_WORDS_BYTES))
                return log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""


def _outcome(
    exits: Sequence[Exit], ranks: Sequence[int], requests: StopRequests, directory: RunDirectory, words: _LastWords
) -> UnderstudyError:
    """What it means that of the processes of `ranks` only `exits` ended by themselves, or not all with 0."""
    causes = {rank: cause for rank in ranks if (cause := read_cause(directory.cause(rank)))}
    stops = {rank: cause for rank, cause in causes.items() if cause.exit_status == STOPPED}
    # A process that our signal ended was not yet, or no longer, ready to stop; its peers may have seen it vanish.
    unready = [e.rank for e in exits if -e.status in requests.received[:1] and e.rank not in causes]
    failed = [end for end in exits if not end.well and end.status != STOPPED and end.rank not in unready]
    if failed and not (unready and all(end.rank in causes and causes[end.rank].peer_failed for end in failed)):
        left = {rank: cause for rank, cause in causes.items() if rank not in stops}
        return _failure(failed, left, ranks, directory, words)
    if unready:
        return _ended_by_signal(requests, directory)
    if len(exits) < len(ranks) and len(requests.received) > 1:
        return _killed(requests, directory)
    if not stops:
        return StoppedError("stopped on request; run again to go on.")
    first = stops[min(stops)]
    return StoppedError(first.message, begun=first.step is not None)


def _failure(
    failed: Sequence[Exit],
    causes: Mapping[int, Cause],
    ranks: Sequence[int],
    directory: RunDirectory,
    words: _LastWords,
) -> UnderstudyError:
    vanished = [end for end in failed if end.rank not in causes]
    starved, misfits = words.starved(vanished), words.misfits(vanished)
    if not causes and not starved and (free_bytes := shutil.disk_usage(directory.path).free) < CAUSE_BYTES:
        kept = " Checkpoints committed before are intact." if _has_checkpoint(directory) else ""
        message = (
            f"{directory.path}: no space is left on the disk ({free_bytes:,} bytes are free, and a process that fails "
            f"needs {CAUSE_BYTES:,} to say why); free some, or choose another output_dir.{kept}"
        )
        return FailedRunError(message, 2, refused=not _has_trained(directory))
    logs, reached = {rank: directory.log(rank) for rank in ranks}, _reached(directory, ranks)
    return first_failure(failed, causes, logs, starved, misfits, reached)


def _reached(directory: RunDirectory, ranks: Sequence[int]) -> int | None:
    """The last step that any of `ranks` told of, or that has a checkpoint: a pulse may be many fast steps old."""
    pulses = [read_pulse(directory.pulse(rank)) for rank in ranks]
    told = [pulse.step for pulse in pulses if pulse is not None and pulse.step is not None]
    return max([*told, *directory.committed_steps()]) if told else None


def _ended_by_signal(requests: StopRequests, directory: RunDirectory) -> UnderstudyError:
    """For processes that did not get to stop by themselves."""
    if _has_checkpoint(directory):
        return StoppedError(f"stopped by {requests}; run again to go on from the last checkpoint.")
    return _killed(requests, directory) if _has_trained(directory) else requests.before_training()


def _killed(requests: StopRequests, directory: RunDirectory) -> FailedRunError:
    way_on = "; run again to go on from the one before" if _has_checkpoint(directory) else ""
    return FailedRunError(f"stopped by {requests} before a checkpoint was committed{way_on}.", 1)


def _has_trained(directory: RunDirectory) -> bool:
    return directory.metrics.exists() and directory.metrics.stat().st_size > 0


def _has_checkpoint(directory: RunDirectory) -> bool:
    return bool(directory.committed_steps())


def _restore_terminal() -> None:
    """A process that was stopped may have left a progress bar on the console, and the cursor hidden."""
    if os.isatty(STDOUT):
        os.write(STDOUT, b"\n\x1b[?25h")
