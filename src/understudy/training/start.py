"""Starts a run: prepares it, then runs this host's processes, alone or together with other hosts."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.devices.detect import detect_machine
from understudy.errors import StoppedError, UnderstudyError
from understudy.launch.cause import FailedRunError
from understudy.launch.hangs import HangWatch
from understudy.launch.host_group import Alone, Group
from understudy.launch.keeper_note import cut_off_from_launch
from understudy.launch.last_collectives import last_collectives
from understudy.launch.launcher import Share
from understudy.launch.local import launch_local
from understudy.launch.outcome import first_outcome, told_outcome
from understudy.launch.processes import Watcher
from understudy.launch.run_claim import claim_run_directory
from understudy.launch.run_directory import RunDirectory
from understudy.launch.run_lock import still_owned
from understudy.launch.signals import StopRequests, noted_signals
from understudy.launch.stragglers import StragglerWatch
from understudy.plan.machine import Machine
from understudy.recipe.environment import HostEnvironment, processes_per_host
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.training.beginning import begin_run, choose_for_run, prepare_run
from understudy.training.choosing import Chosen

if TYPE_CHECKING:
    from understudy.training.prepare import Prepared
    from understudy.training.restarting import Restarts

__all__ = ["chosen_processes", "start_locally"]

WORKER = "understudy.training.worker"


def start_locally(
    recipe: Recipe,
    sources: SourceMap,
    *,
    overwrite: bool,
    say: Callable[[str], None],
    host: HostEnvironment | None = None,
) -> None:
    """Prepares the run here, then runs its processes on this host until they are done, all of them or, where `host` is
    one of several, its share. Raises the failure that came first, on any host, and `StoppedError` when asked to stop.

    With several hosts the first one leads: it owns the run directory, which all must see, and decides where the run
    goes on from. Processes that are lost are started again, up to `cluster.max_restarts` times, without hosts that are
    lost as long as `cluster.min_nodes` are left.
    """
    with noted_signals() as requests, ExitStack() as stack:
        with requests.interruptible():
            machine = detect_machine()
            processes = chosen_processes(recipe, sources, machine)
            group: Group = Alone()
            if host is None:
                _refuse_alone(recipe, sources)
            else:
                from understudy.training.meeting import meet

                group = stack.enter_context(meet(host, recipe, sources, say))
        try:
            counts = _counts(group, recipe, processes, requests)
            _run(_HostRun(recipe, sources, machine, group, host, counts, requests, say), overwrite=overwrite)
        except BaseException as error:
            group.give_up(error)
            raise


def chosen_processes(recipe: Recipe, sources: SourceMap, machine: Machine) -> int:
    """How many processes to start on this host: `cluster.processes`, or NPROC_PER_NODE of the environment. Raises
    `UserError` when the two differ or there are fewer devices."""
    asked, told = recipe.cluster.processes, processes_per_host()
    if told is not None and asked not in ("auto", told):
        raise sources.error(
            "cluster.processes",
            f"{asked} processes a host, but the environment has NPROC_PER_NODE={told}; unset one of the two.",
        )
    processes = told or (max(1, machine.devices) if asked == "auto" else asked)
    if machine.accelerated and processes > machine.devices:
        raise sources.error(
            "cluster.processes",
            f"{processes} processes are more than the {machine.devices} devices of this host; start at most one a "
            "device.",
        )
    return processes


@dataclass(frozen=True)
class _HostRun:
    """What is known of a run on one of its hosts."""

    recipe: Recipe
    sources: SourceMap
    machine: Machine
    group: Group
    host: HostEnvironment | None
    counts: dict[int, int]
    """Processes of each host."""
    requests: StopRequests
    say: Callable[[str], None]

    @property
    def processes(self) -> int:
        """Of all hosts that take part now."""
        return sum(self.counts[node] for node in self.group.members)

    def share(self, attempt: int) -> Share | None:
        """This host's part of them; None where there is no other host."""
        if self.host is None:
            return None
        first = self.ranks(self.group.node).start
        return Share(first, self.processes, self.host.address, self.host.port, attempt)

    def ranks(self, node: int) -> range:
        """Of a host that takes part."""
        before = sum(self.counts[member] for member in self.group.members if member < node)
        return range(before, before + self.counts[node])


def _refuse_alone(recipe: Recipe, sources: SourceMap) -> None:
    if (nodes := recipe.cluster.nodes) > 1:
        raise sources.error(
            "cluster.nodes",
            f"{nodes} hosts, but nothing here says which one this is; start it on all with `understudy launch` or "
            "`understudy submit`, or on each with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set, or set "
            "cluster.nodes=1.",
        )
    if (least := recipe.cluster.min_nodes) is not None and least > 1:
        raise sources.error("cluster.min_nodes", f"{least} hosts at least, but this is one alone; leave it out.")


def _counts(group: Group, recipe: Recipe, processes: int, requests: StopRequests) -> dict[int, int]:
    """Processes of each host, which have all come and are about to run the same recipe with the same software."""
    if isinstance(group, Alone):
        return {0: processes}
    from understudy.training.meeting import introduction, require_alike

    told = group.share("introduction", introduction(recipe, processes), requests.check)
    require_alike(told)
    return {node: one["processes"] for node, one in told.items()}


def _run(run: _HostRun, *, overwrite: bool) -> None:
    nodes = len(run.counts)
    with run.requests.interruptible():
        chosen = choose_for_run(run.recipe, run.sources, run.machine, run.processes, nodes=nodes, overwrite=overwrite)
    if run.group.leads:
        _lead(run, chosen, overwrite=overwrite)
    else:
        _follow(run, chosen)


def _lead(run: _HostRun, chosen: Chosen, *, overwrite: bool) -> None:
    resolved, sources, say = chosen.recipe, run.sources, run.say
    path, resume = Path(resolved.output_dir), resolved.checkpoint.resume
    with claim_run_directory(path, sources, overwrite=overwrite, resume=resume, report=say) as claim:
        with run.requests.interruptible():
            prepared = prepare_run(resolved, sources, run.machine, claim, say)
            _require_same_data(run, prepared)
        begin_run(prepared, chosen, claim, say)

        from understudy.training.restarting import Restarts

        restarts = Restarts(
            prepared.job,
            prepared.resumed_step,
            original=run.recipe,
            asked=resolved,
            machine=run.machine,
            claim=claim,
            say=say,
        )
        try:
            run.group.share("begun", {"directory": str(path.resolve()), "token": claim.token}, run.requests.check)
            _attempts(run, claim.directory, (), restarts)
        # What has been started again has something to keep.
        except FailedRunError as error:
            if error.refused and not restarts.count:
                claim.withdraw()
            raise
        except StoppedError as error:
            if not error.begun and not restarts.count:
                claim.withdraw()
            raise


def _follow(run: _HostRun, chosen: Chosen) -> None:
    """Each process of this host is told by rank 0 what the leading host has decided (`worker.run_worker`)."""
    with run.requests.interruptible():
        from understudy.training.job import write_job
        from understudy.training.prepare import prepare_job

        prepared = prepare_job(chosen.recipe, run.sources, run.say)
        _require_same_data(run, prepared)
        begun = run.group.share("begun", None, run.requests.check)[run.group.members[0]]
        directory = RunDirectory(Path(begun["directory"]))
        if not still_owned(directory.path, begun["token"]):
            raise run.sources.error(
                "output_dir",
                f"{directory.path} of the first host is not seen on this one; put output_dir on a disk that all hosts "
                "share, under the same path.",
            )
    with tempfile.TemporaryDirectory(prefix="understudy-") as private:
        job = Path(private) / "job.json"
        write_job(job, replace(prepared.job, run_directory=directory.path))
        _attempts(run, directory, (str(job),), None)


def _require_same_data(run: _HostRun, prepared: Prepared) -> None:
    if isinstance(run.group, Alone):
        return
    from understudy.training.meeting import prepared_things, require_same_things

    told = run.group.share("prepared", prepared_things(prepared), run.requests.check)
    require_same_things(told)


def _attempts(run: _HostRun, directory: RunDirectory, job: Sequence[str], restarts: Restarts | None) -> None:
    """Runs the processes until all have ended well, as often as the leading host's `restarts` have it."""
    arguments = (sys.executable, "-m", WORKER, str(directory.path), *job)
    group, attempt = run.group, 0
    while True:
        outcome = _attempt(run, arguments, directory, attempt)
        ours = told_outcome(outcome, last_collectives(directory, run.ranks(group.node)))
        told = group.share(f"outcome {attempt}", ours, _nothing, tolerant=True)
        lost = [node for node in group.members if node not in told]
        theirs = last_collectives(directory, (rank for node in lost for rank in run.ranks(node)))
        first = first_outcome(told, group.lost(lost) if lost else None, theirs)
        if first is None:
            return
        if group.members[0] in lost:
            raise first
        group.drop(lost)
        if restarts is not None:
            cut_off = bool(lost) and cut_off_from_launch()
            problem = first if cut_off else _prepare_again(run, restarts, first, len(run.counts))
            decided = None if problem is None else told_outcome(problem)
            group.share(f"decision {attempt}", {"again": problem is None, "end": decided}, _nothing)
            if problem is not None:
                raise problem
        else:
            decision = group.share(f"decision {attempt}", None, _nothing)[group.members[0]]
            if not decision["again"]:
                raise first_outcome({0: decision["end"]}, None) or first
        attempt += 1


def _attempt(
    run: _HostRun, arguments: tuple[str, ...], directory: RunDirectory, attempt: int
) -> UnderstudyError | None:
    """How the processes ended."""
    watchers: list[Watcher] = [
        lambda: run.group.trouble(attempt),
        HangWatch(directory, run.processes, run.recipe.cluster.hang_seconds),
    ]
    if run.group.leads:
        watchers.append(StragglerWatch(directory, run.processes, run.say))
    try:
        launch_local(
            arguments,
            run.counts[run.group.node],
            directory,
            run.machine.cores,
            accelerated=run.machine.accelerated,
            share=run.share(attempt),
            watchers=watchers,
        )
    except UnderstudyError as error:
        return error
    return None


def _prepare_again(run: _HostRun, restarts: Restarts, first: UnderstudyError, nodes: int) -> UnderstudyError | None:
    """None where the run is ready to be started again after `first`; else what it ends with."""
    left = len(run.group.members)
    if left < (run.recipe.cluster.min_nodes or nodes):
        return first
    try:
        restarts.prepare(first, run.processes, left)
    except UnderstudyError as error:
        return error
    return None


def _nothing() -> None:
    """Processes that have ended have done what was asked, if they were asked to stop."""
