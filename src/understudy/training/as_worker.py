"""Runs this process as one of a launcher's: torchrun's, accelerate's, deepspeed's or srun's."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from understudy.devices.detect import detect_machine
from understudy.errors import OutOfMemoryError, StoppedError, UserError
from understudy.launch.cause import Cause, failure_of, write_cause
from understudy.launch.last_collectives import last_collectives, with_collectives
from understudy.launch.run_claim import Claim, claim_run_directory
from understudy.launch.run_directory import RunDirectory
from understudy.launch.signals import noted_signals
from understudy.launch.watching import start_watching
from understudy.plan.machine import Machine
from understudy.recipe.environment import ProcessEnvironment
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.training.beginning import begin_run, choose_for_run, prepare_run
from understudy.training.choosing import Chosen, choose_as_usual

__all__ = ["start_as_worker"]

STDOUT, STDERR = 1, 2
TAKE_BACK_SECONDS = 5.0


def start_as_worker(
    recipe: Recipe, sources: SourceMap, environment: ProcessEnvironment, *, overwrite: bool, say: Callable[[str], None]
) -> None:
    """Runs this process as one of a launcher's. Each prepares for itself, one building and the others waiting for what
    it builds; rank 0 owns the run directory. On a failure of the run the process ends with that failure's status.
    Raises `StoppedError` when asked to stop while it prepares."""
    with noted_signals() as requests, ExitStack() as stack:
        with requests.interruptible():
            from understudy.training.console import open_console, silent_console
            from understudy.training.prepare import prepare_job
            from understudy.training.restarting import leave_lesson
            from understudy.training.worker import run_worker

            machine = detect_machine()
            chosen = _chosen_as_worker(recipe, sources, machine, environment, overwrite=overwrite)
            resolved = chosen.recipe
        path = Path(resolved.output_dir)
        if environment.rank == 0:
            resume = resolved.checkpoint.resume
            claim = stack.enter_context(
                claim_run_directory(path, sources, overwrite=overwrite, resume=resume, report=say)
            )
            with requests.interruptible():
                prepared = prepare_run(resolved, sources, machine, claim, say)
            begin_run(prepared, chosen, claim, say)
            if requests.received:
                claim.withdraw()
            console, take_back = open_console(STDOUT), partial(_take_back, claim, stack)
        else:
            with requests.interruptible():
                prepared = prepare_job(resolved, sources, lambda _: None)
            console, take_back = silent_console(), partial(_wait_until_taken_back, RunDirectory(path))
        requests.check()
        learn = partial(leave_lesson, RunDirectory(path), original=recipe, asked=resolved, machine=machine)
        entered = _Entered(RunDirectory(path), environment, resolved.cluster.hang_seconds)
        report = _reporter(take_back, partial(_leave, stack), learn, entered)
        # From here on requests are for `run_worker` to look at.
        run_worker(prepared.job, environment, console, report=report, entered=entered)


def _chosen_as_worker(
    recipe: Recipe, sources: SourceMap, machine: Machine, environment: ProcessEnvironment, *, overwrite: bool
) -> Chosen:
    """Rank 0's choice is everybody's in the end (`worker.run_worker`), for hosts differ in the memory that is free. The
    first process of a host is the one to say that nothing fits there."""
    size, asked = environment.world_size, recipe.cluster.nodes
    nodes = max(1, size // environment.local_world_size)
    if asked not in (1, nodes):
        raise sources.error(
            "cluster.nodes", f"{asked} hosts, but this launcher started processes on {nodes}; make them the same."
        )
    try:
        return choose_for_run(recipe, sources, machine, size, nodes=nodes, overwrite=overwrite)
    except OutOfMemoryError:
        if environment.local_rank == 0:
            raise
        return choose_as_usual(recipe, machine, size, nodes=nodes)


class _Entered:
    """What a process does once all have met: the run directory is then this run's."""

    def __init__(self, directory: RunDirectory, environment: ProcessEnvironment, hang_seconds: float) -> None:
        self._directory = directory
        self._environment = environment
        self._hang_seconds = hang_seconds
        self._done = False

    def __call__(self) -> None:
        directory, rank = self._directory, self._environment.rank
        directory.cause(rank).unlink(missing_ok=True)  # an earlier run's
        if self._environment.local_rank == 0:
            start_watching(directory, self._environment.world_size, self._hang_seconds, rank)
        _send_output_to(directory.log(rank))
        self._done = True

    def sentence(self, cause: Cause) -> str:
        """What failed, with the last collective that each rank was in, as far as it told."""
        failure = failure_of(cause, self._directory.log(cause.rank))
        if not self._done or failure.exit_status == UserError.exit_status:
            return str(failure)
        return with_collectives(str(failure), last_collectives(self._directory, range(self._environment.world_size)))

    def note(self, cause: Cause) -> None:
        """Leaves it in the run directory, where that is known to be ours, and is going to stay."""
        if self._done and not cause.refused:
            with suppress(OSError):  # a full disk; it is said all the same
                write_cause(self._directory.cause(cause.rank), cause)


def _reporter(
    take_back: Callable[[], bool], leave: Callable[[], None], learn: Callable[[Cause], str], entered: _Entered
) -> Callable[[Cause], None]:
    """Says a failure on what is standard error now, whatever is redirected later. One that others follow from is said
    alone, and a refused run is taken back by `take_back`, which is false where another process speaks. All stop alike
    on request: rank 0 says so, and calls `leave` when there is something to keep. What is to be said of a process that
    is out of memory is `learn`'s."""
    stream = os.fdopen(os.dup(STDERR), "w", encoding="utf-8")

    def report(cause: Cause) -> None:
        entered.note(cause)
        stopped = cause.exit_status == StoppedError.exit_status
        if cause.peer_failed or (stopped and cause.rank != 0) or (cause.refused and not take_back()):
            return
        mark = "" if stopped else "error: "
        message = cause.message if stopped else entered.sentence(cause) if cause.shortage is None else learn(cause)
        stream.write("".join(f"{mark}{line}\n" for line in message.splitlines()))
        stream.flush()
        if stopped:
            (take_back if cause.step is None else leave)()

    return report


def _leave(stack: ExitStack) -> None:
    """Gives up the run directory: the process ends without unwinding, and another host could not know that it has."""
    with suppress(UserError):  # a disk that fails now; the marker then names a dead process
        stack.close()


def _take_back(claim: Claim, stack: ExitStack) -> bool:
    """Leaves the run directory as if the run had not begun: the process ends without unwinding."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher stops us as soon as a peer has ended
    claim.withdraw()
    stack.close()
    return True


def _wait_until_taken_back(directory: RunDirectory) -> bool:
    """Whether rank 0 did not refuse the run too, within a while: a launcher kills it as soon as we are gone."""
    begun = _identity(directory.job)
    deadline = time.monotonic() + TAKE_BACK_SECONDS
    while begun is not None and time.monotonic() < deadline:
        if _identity(directory.job) != begun:
            return False
        time.sleep(0.05)
    return begun is not None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _send_output_to(log: Path) -> None:
    """From now on whatever this process and its libraries print goes to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file:
        os.dup2(file.fileno(), STDOUT)
        os.dup2(file.fileno(), STDERR)
