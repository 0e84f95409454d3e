"""Starts a run: on this host with processes of our own, or as one process of somebody else's launcher."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.devices.detect import detect_machine
from understudy.errors import OutOfMemoryError, StoppedError, UserError
from understudy.launch.cause import Cause, FailedRunError, ShortOfMemoryError
from understudy.launch.local import launch_local
from understudy.launch.run_claim import Claim, claim_run_directory, require_space
from understudy.launch.run_directory import RunDirectory
from understudy.launch.signals import noted_signals
from understudy.plan.machine import Machine
from understudy.recipe.dump import dump_recipe
from understudy.recipe.environment import ProcessEnvironment, cache_directory
from understudy.recipe.rules import check_processes
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.training.choosing import Chosen, choose, choose_as_usual, find_earlier

if TYPE_CHECKING:
    from understudy.training.prepare import Prepared

__all__ = ["chosen_processes", "start_as_worker", "start_locally"]

STDOUT, STDERR = 1, 2
SMALL_FILES_BYTES = 64 * 2**20
"""What a run writes beside the final model's weights: tokenizer, metrics, logs."""
TAKE_BACK_SECONDS = 5.0


def start_locally(recipe: Recipe, sources: SourceMap, *, overwrite: bool, say: Callable[[str], None]) -> None:
    """Prepares the run here, then runs its processes on this host until they are done. Raises the first failure, and
    `StoppedError` when asked to stop."""
    with noted_signals() as requests, ExitStack() as stack:
        with requests.interruptible():
            machine = detect_machine()
            processes = chosen_processes(recipe, sources, machine)
            chosen = _chosen(recipe, sources, machine, processes, overwrite=overwrite)
            resolved = chosen.recipe
        path = Path(resolved.output_dir)
        resume = resolved.checkpoint.resume
        claim = stack.enter_context(claim_run_directory(path, sources, overwrite=overwrite, resume=resume, report=say))
        with requests.interruptible():
            prepared = _prepare(resolved, sources, machine, claim, say)
        _begin(prepared, chosen, claim, say)

        from understudy.training.restarting import Restarts

        restarts = Restarts(
            prepared.job,
            prepared.resumed_step,
            original=recipe,
            asked=resolved,
            machine=machine,
            claim=claim,
            say=say,
        )
        arguments = (sys.executable, "-m", "understudy.training.worker", str(claim.directory.path))
        while True:
            try:
                launch_local(arguments, processes, claim.directory, machine.cores, accelerated=machine.accelerated)
                return
            except ShortOfMemoryError as error:
                restarts.prepare(error)
            # What has been started again has something to keep.
            except FailedRunError as error:
                if error.refused and not restarts.count:
                    claim.withdraw()
                raise
            except StoppedError as error:
                if not error.begun and not restarts.count:
                    claim.withdraw()
                raise


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
                prepared = _prepare(resolved, sources, machine, claim, say)
            _begin(prepared, chosen, claim, say)
            if requests.received:
                claim.withdraw()
            console, take_back = open_console(STDOUT), partial(_take_back, claim, stack)
        else:
            with requests.interruptible():
                prepared = prepare_job(resolved, sources, lambda _: None)
            console, take_back = silent_console(), partial(_wait_until_taken_back, RunDirectory(path))
        requests.check()
        learn = partial(leave_lesson, RunDirectory(path), original=recipe, asked=resolved, machine=machine)
        report = _reporter(take_back, partial(_leave, stack), learn)
        # The directory for logs is there once rank 0 has entered the process group.
        entered = partial(_send_output_to, RunDirectory(path).log(environment.rank))
        # From here on requests are for `run_worker` to look at.
        run_worker(prepared.job, environment, console, report=report, entered=entered)


def _chosen(
    recipe: Recipe, sources: SourceMap, machine: Machine, processes: int, *, nodes: int = 1, overwrite: bool
) -> Chosen:
    check_processes(recipe, processes, sources)
    earlier = find_earlier(recipe, overwrite=overwrite)
    return choose(recipe, sources, machine, processes, nodes=nodes, earlier=earlier)


def _chosen_as_worker(
    recipe: Recipe, sources: SourceMap, machine: Machine, environment: ProcessEnvironment, *, overwrite: bool
) -> Chosen:
    """Rank 0's choice is everybody's in the end (`worker.run_worker`), for hosts differ in the memory that is free. The
    first process of a host is the one to say that nothing fits there."""
    size = environment.world_size
    nodes = max(1, size // environment.local_world_size)
    try:
        return _chosen(recipe, sources, machine, size, nodes=nodes, overwrite=overwrite)
    except OutOfMemoryError:
        if environment.local_rank == 0:
            raise
        return choose_as_usual(recipe, machine, size)


def chosen_processes(recipe: Recipe, sources: SourceMap, machine: Machine) -> int:
    """How many processes to start on this host. Raises `UserError` when there are fewer devices."""
    asked = recipe.cluster.processes
    processes = max(1, machine.devices) if asked == "auto" else asked
    if machine.accelerated and processes > machine.devices:
        raise sources.error(
            "cluster.processes",
            f"{processes} processes are more than the {machine.devices} devices of this host; start at most one a "
            "device.",
        )
    return processes


def _prepare(
    recipe: Recipe, sources: SourceMap, machine: Machine, claim: Claim, say: Callable[[str], None]
) -> Prepared:
    """Prepares the job and finds the checkpoint to go on from; writes nothing to the run directory."""
    directory = claim.directory
    _refuse_to_replace_what_is_named(recipe, sources, claim)
    _require_inputs(recipe, sources)

    from understudy.checkpoint.store import CheckpointStore
    from understudy.training.checkpointing import most_checkpoints
    from understudy.training.out_of_memory import as_learned, read_lesson, sizes_in_words
    from understudy.training.prediction import with_prediction
    from understudy.training.prepare import prepare_job, require_fit
    from understudy.training.resume import choose_checkpoint

    prepared = prepare_job(recipe, sources, say)
    found = choose_checkpoint(
        recipe,
        sources,
        CheckpointStore(directory.checkpoints),
        data_digest=prepared.data_digest,
        total_steps=prepared.steps,
        begun_from=directory.recorded_resume if claim.may_go_on else None,
        going_on=claim.may_go_on,
        say=say,
    )
    if found is not None:
        require_fit(prepared.job, found.checkpoint)
    # Where a run goes on, its checkpoints are on the disk, and leave it as others come.
    checkpoints = 1 if claim.may_go_on else most_checkpoints(recipe.checkpoint, prepared.steps)
    needed = prepared.model_bytes + checkpoints * prepared.checkpoint_bytes + SMALL_FILES_BYTES
    require_space(directory.path, needed, "the run", sources)
    learned = as_learned(recipe, machine, read_lesson(directory.memory) if claim.may_go_on else None)
    if learned != recipe:
        say(f"memory: this run ran out of it before; it goes on with {sizes_in_words(learned)}")
    resume = None if found is None else found.checkpoint
    job = with_prediction(replace(prepared.job, recipe=learned, resume=resume, token=claim.token), machine)
    return replace(prepared, job=job, resumed_step=0 if found is None else found.progress.step)


def _begin(prepared: Prepared, chosen: Chosen, claim: Claim, say: Callable[[str], None]) -> None:
    """Begins the run, or goes on with it, and says what is going to happen."""
    from understudy.checkpoint.store import CheckpointStore
    from understudy.training.job import write_job
    from understudy.training.opening import opening_lines
    from understudy.training.out_of_memory import readable

    recipe, step = dump_recipe(readable(prepared.job.recipe)), prepared.resumed_step
    try:
        if claim.may_go_on:
            directory = claim.go_on(recipe, step)
            store = CheckpointStore(directory.checkpoints)
            store.clean()
            store.set_aside_after(step)
        else:
            directory = claim.begin(recipe)
        write_job(directory.job, prepared.job)
    except OSError:
        claim.withdraw()
        raise
    say("\n".join([opening_lines(prepared), *chosen.lines]))


def _refuse_to_replace_what_is_named(recipe: Recipe, sources: SourceMap, claim: Claim) -> None:
    named, run = Path(recipe.checkpoint.resume).resolve(), claim.directory.path.resolve()
    if not claim.may_go_on and named.is_relative_to(run) and named.exists():
        raise sources.error(
            "checkpoint.resume",
            f"{recipe.checkpoint.resume} is in the run that --overwrite is to replace; leave out one of the two.",
        )


def _require_inputs(recipe: Recipe, sources: SourceMap) -> None:
    """Refuses at once what is not there: to import torch and build the model takes seconds."""
    from understudy.data.prepare import find_sources
    from understudy.models.source import model_directory, tokenizer_directory
    from understudy.training.resume import require_place

    require_place(recipe, sources)
    if recipe.model.path is not None:
        with sources.placing("model.path"):
            model_directory(recipe.model)
    with sources.placing("model.tokenizer" if recipe.model.tokenizer else "model.path"):
        tokenizer_directory(recipe.model)
    find_sources(recipe, sources, cache_directory())


def _reporter(
    take_back: Callable[[], bool], leave: Callable[[], None], learn: Callable[[Cause], str]
) -> Callable[[Cause], None]:
    """Says a failure on what is standard error now, whatever is redirected later. One that others follow from is said
    alone, and a refused run is taken back by `take_back`, which is false where another process speaks. All stop alike
    on request: rank 0 says so, and calls `leave` when there is something to keep. What is to be said of a process that
    is out of memory is `learn`'s."""
    stream = os.fdopen(os.dup(STDERR), "w", encoding="utf-8")

    def report(cause: Cause) -> None:
        stopped = cause.exit_status == StoppedError.exit_status
        if cause.peer_failed or (stopped and cause.rank != 0) or (cause.refused and not take_back()):
            return
        mark = "" if stopped else "error: "
        message = cause.message if cause.shortage is None else learn(cause)
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
