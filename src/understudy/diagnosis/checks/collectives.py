"""Processes that talk to each other as those of a run do: every pair of them, and all together."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from understudy.diagnosis.check import Finding, Host, broken, check, ok
from understudy.diagnosis.progress import Step, read_progress
from understudy.diagnosis.sizes import shown
from understudy.errors import UnderstudyError, UserError
from understudy.launch.cause import Cause, read_cause
from understudy.launch.local import launch_local
from understudy.launch.run_directory import RunDirectory

WORKER = (sys.executable, "-m", "understudy.diagnosis.collectives_worker")
SECONDS = 120.0
"""From the start of the processes to their end; on a machine that is not busy it takes some ten."""
PROCESSES = 2
"""Where there are no devices."""
_A_CORE = 8
"""Processes at most that are started for each core, where there are no devices."""
BETWEEN_DEVICES = (
    "See how the devices are connected (`nvidia-smi topo -m`). Where they reach into each other's memory wrongly, as "
    "in some virtual machines, NCCL_P2P_DISABLE=1 goes around it; NCCL_DEBUG=INFO says what was tried."
)
ON_THE_HOST = (
    "See that a firewall lets the processes of this host reach each other (127.0.0.1, interface lo), and that memory "
    "is enough for them."
)


def refuse_too_many(host: Host) -> None:
    """Raises `UserError` where more processes are asked for than there are devices, or than the cores start in time."""
    asked = host.processes
    if asked is None:
        return
    machine = host.machine
    if machine.accelerated and asked > machine.devices:
        raise UserError(
            f"{asked} processes do not fit on {machine.devices} accelerators, one each; leave --processes out."
        )
    most = _A_CORE * machine.cores
    if not machine.accelerated and asked > most:
        raise UserError(
            f"{asked} processes are too many to meet in time on {machine.cores} cores; give --processes at most {most}."
        )


@check("collectives", seconds=SECONDS + 30, alone=True, if_lost=f"{ON_THE_HOST} {BETWEEN_DEVICES}")
def collectives(host: Host) -> Finding:
    """An all-reduce between each two devices, then all-reduce, all-gather and reduce-scatter between all of them."""
    machine = host.machine
    refuse_too_many(host)
    processes = host.processes or machine.devices or PROCESSES
    fix = BETWEEN_DEVICES if machine.accelerated else ON_THE_HOST
    with tempfile.TemporaryDirectory(prefix="understudy-collectives-") as scratch:
        return try_collectives(
            WORKER, processes, RunDirectory(Path(scratch)), machine.cores, accelerated=machine.accelerated, fix=fix
        )


def try_collectives(
    worker: Sequence[str],
    processes: int,
    directory: RunDirectory,
    cores: int,
    *,
    accelerated: bool,
    fix: str,
    seconds: float = SECONDS,
) -> Finding:
    """Runs `worker DIRECTORY` in `processes` processes for at most `seconds`, and says what they came to. Main thread
    only: the time limit is a signal."""
    arguments = (*worker, str(directory.path))
    problem: str | None = None
    try:
        with _at_most(seconds):
            launch_local(arguments, processes, directory, cores, accelerated=accelerated, console=False)
    except _OutOfTimeError:
        problem = f"not over after {seconds:.0f} s"
    except UnderstudyError as error:
        causes = [read_cause(directory.cause(rank)) for rank in range(processes)]
        problem = _words([cause for cause in causes if cause is not None], error)
        if not any(causes) and (said := _last_words(directory, processes)):
            problem += f"; it said last: {said}"
    steps = [step for rank in range(processes) for step in read_progress(directory.path, rank)]
    if problem is not None:
        return _broken(problem, steps, processes, fix)
    wrong = [step for step in steps if step.right is False]
    if wrong:
        details = {"wrong": sorted({step.name for step in wrong})}
        return broken(f"wrong results: {', '.join(details['wrong'])}", fix, **details)
    return _ok(steps, processes)


def _ok(steps: Sequence[Step], processes: int) -> Finding:
    rates: dict[str, float] = {}
    for step in steps:
        if step.bytes_per_second is not None:  # the slowest rank has waited for nobody
            rates[step.name] = min(step.bytes_per_second, rates.get(step.name, step.bytes_per_second))
    pairs = {name: rate for name, rate in rates.items() if name.startswith("pair ")}
    together = {name: rate for name, rate in rates.items() if name not in pairs}
    found = f"{processes} process{'es' if processes > 1 else ''}"
    if together:
        found += ": " + ", ".join(f"{name} {shown(rate)}/s" for name, rate in together.items())
    if len(pairs) > 1:
        slowest, fastest = min(pairs, key=pairs.__getitem__), max(pairs, key=pairs.__getitem__)
        found += (
            f"; {len(pairs)} pairs, from {shown(pairs[slowest])}/s ({slowest}) to {shown(pairs[fastest])}/s ({fastest})"
        )
    return ok(found, processes=processes, bytes_per_second=rates)


def _broken(problem: str, steps: Sequence[Step], processes: int, fix: str) -> Finding:
    """Where it stopped: what all its members began and did not all end. Others wait for one of those; only where there
    is none, somebody did not arrive."""
    if not steps:
        return broken(f"no process got as far as meeting the others: {problem}", fix)
    begun: dict[str, set[int]] = {}
    for step in steps:
        begun.setdefault(step.name, set()).add(step.rank)
    unfinished = {step.name: set(step.members) - begun[step.name] for step in steps if not step.done}
    stuck = [name for name, missing in unfinished.items() if not missing]
    absent = sorted({rank for missing in unfinished.values() for rank in missing})
    if stuck:
        return broken(f"{', '.join(stuck)}: {problem}", fix, stuck=stuck)
    names = ", ".join(unfinished) or "the end"
    ranks = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))} did not get there, " if absent else ""
    return broken(f"{names}: {ranks}{problem}", fix, absent=absent)


def _words(causes: Sequence[Cause], error: UnderstudyError) -> str:
    """What the process that failed first said; of one that vanished, how."""
    first = min(causes, key=lambda cause: (cause.peer_failed, cause.time_seconds), default=None)
    if first is None or first.peer_failed:
        return str(error).partition(";")[0]  # the rest names a log, which is gone by then
    return f"rank {first.rank}: {first.message}"


def _last_words(directory: RunDirectory, processes: int) -> str:
    """The last line of the first process that printed any."""
    logs = (directory.log(rank).read_text(encoding="utf-8", errors="replace").strip() for rank in range(processes))
    return next((log.splitlines()[-1] for log in logs if log), "")


class _OutOfTimeError(BaseException):
    """Raised wherever the main thread is. No `Exception`: what handles failures must not take it for one."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def end(_number: int, _frame: FrameType | None) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
