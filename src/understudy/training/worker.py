"""One process of a run: how it comes to the others, and how it ends. `python -m understudy.training.worker DIR`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from understudy.devices.device import Device, find_device
from understudy.launch.cause import Cause, write_cause
from understudy.launch.parent import die_with_parent
from understudy.launch.pulses import LOADING, MEETING, PROVING
from understudy.launch.run_directory import RunDirectory
from understudy.parallel.world import process_group
from understudy.recipe.environment import (
    ProcessEnvironment,
    console_descriptor,
    launcher_process,
    process_environment,
    remember_collectives,
)
from understudy.recipe.sizes import limited_bytes
from understudy.training.clocks import clock_lead_ns
from understudy.training.console import Console, open_console, silent_console
from understudy.training.failure import StepNote, ending_on_failure
from understudy.training.final_model import prove_final_model
from understudy.training.headway import Headway
from understudy.training.job import Job, read_job
from understudy.training.pulse import REMEMBERED, beating
from understudy.training.run import train_and_save
from understudy.training.stopping import StopRequest

__all__ = ["main", "run_worker"]


def main() -> None:
    """Entry point of the processes that our own launcher starts: with the run directory, and where the job is another
    file than that one's, that file."""
    if (launcher := launcher_process()) is not None:
        die_with_parent(launcher)
    directory, *others = map(Path, sys.argv[1:])
    job = read_job(others[0] if others else RunDirectory(directory).job)
    environment = process_environment()
    assert environment is not None, "a launcher sets RANK and WORLD_SIZE"
    descriptor = console_descriptor()
    console = silent_console() if descriptor is None else open_console(descriptor)
    cause_file = RunDirectory(job.run_directory).cause(environment.rank)
    run_worker(job, environment, console, report=partial(write_cause, cause_file))


def run_worker(
    job: Job,
    environment: ProcessEnvironment,
    console: Console,
    *,
    report: Callable[[Cause], None],
    entered: Callable[[], None] | None = None,
) -> None:
    """Trains, evaluates, saves and proves, as one of `environment.world_size` processes.

    `entered` is called once all processes have met, and has returned on all before any goes on; only then the run
    directory is known to be this run's. It is from the start where this is None. On a failure the process ends with the
    failure's exit status; `report` is given its cause first.
    """
    remember_collectives(REMEMBERED)
    note, headway, stop = StepNote(), Headway(), StopRequest()
    pulse = beating(RunDirectory(job.run_directory), environment.rank, environment.world_size, headway)
    with ending_on_failure(environment.rank, note, report), stop.noting_signals(), ExitStack() as stack:
        if entered is None:
            stack.enter_context(pulse)
        device = find_device()
        torch_device = device.torch_device(environment.local_rank)
        _limit_memory(job, device, environment.local_world_size)
        headway.begin(MEETING)
        with (
            process_group(environment, torch_device, device.backend) as world,
            ending_on_failure(environment.rank, note, report),
        ):
            if entered is not None:
                entered()
                stack.enter_context(pulse)
            dist.barrier()
            headway.clock_lead_ns = clock_lead_ns()
            headway.begin(LOADING)
            trained = train_and_save(_as_on_rank_0(job), device, torch_device, world, console, note, headway, stop)
            if environment.rank != 0:
                stack.close()  # there is nothing more to tell
        if environment.rank == 0:
            headway.begin(PROVING)
            prove_final_model(job, trained, console)


def _limit_memory(job: Job, device: Device, processes: int) -> None:
    limit = limited_bytes(job.recipe.training.memory_limit, device.process_bytes(processes))
    if limit is not None:
        with job.sources.placing("training.memory_limit"):
            device.limit_memory(limit)


def _as_on_rank_0(job: Job) -> Job:
    """Under a launcher each process prepares its own job, and what `auto` comes to depends on the memory that is free
    on its host. Rank 0's choice is everybody's; it alone knows where the run goes on from, and what it learned about
    memory before."""
    ours = {"strategy": job.recipe.strategy, "training": job.recipe.training}
    known = [(job.resume, job.token, job.memory_predicted_bytes, ours)]
    dist.broadcast_object_list(known, src=0, device=torch.device("cpu"))
    resume, token, predicted, theirs = known[0]
    recipe = job.recipe.model_copy(update=theirs)
    return replace(job, resume=resume, token=token, memory_predicted_bytes=predicted, recipe=recipe)


if __name__ == "__main__":
    main()
