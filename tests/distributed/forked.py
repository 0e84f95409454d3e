"""Python processes forked from one that has imported all they need: without the seconds that this takes each of them.

What starting by itself comes to, and what is killed, is for tests that start commands as users do.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

from understudy.cli.main import exit_status
from understudy.launch import processes
from understudy.launch.signals import SIGNALS
from understudy.recipe.environment import CONSOLE_VARIABLE, LAUNCHER_VARIABLE

PRELOADED = [
    "understudy.training.start",
    "understudy.training.teacher_answers",
    "understudy.training.worker",
    "understudy.data.prepare",
    "transformers.models.llama.modeling_llama",
    "datasets",
    "deepspeed",
    "peft",
    "torch.utils.tensorboard",
    "tests.distributed.scenario",
]
STDOUT, STDERR = 1, 2


def start_forked(target: Any, *arguments: Any) -> BaseProcess:
    """Calls `target` in a process of its own, which is waited for by this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def run_script(script: Path, arguments: Sequence[str], variables: dict[str, str], log: Path) -> None:
    """As `python script …`."""
    take_over(variables, log, log)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def run_command(
    arguments: Sequence[str],
    variables: Mapping[str, str],
    *,
    prepare: Callable[[], None] | None = None,
    timeout_seconds: float = 240,
) -> subprocess.CompletedProcess[str]:
    """As `understudy …`, with these environment variables alone, after `prepare` in its process. Its workers are forked
    too."""
    with tempfile.TemporaryDirectory(prefix="forked-") as scratch:
        started = start_command(arguments, variables, Path(scratch), prepare=prepare)
        process = started.process
        process.join(timeout_seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            output, errors = started.output.read_bytes(), started.errors.read_bytes()
            raise subprocess.TimeoutExpired(arguments, timeout_seconds, output, errors)
        output_text, errors_text = started.output.read_text(), started.errors.read_text()
        return subprocess.CompletedProcess(arguments, process.exitcode, output_text, errors_text)


@dataclass(frozen=True)
class ForkedCommand:
    """`understudy …`, in a process of its own, and what it says."""

    process: BaseProcess
    output: Path
    errors: Path


def start_command(
    arguments: Sequence[str],
    variables: Mapping[str, str],
    scratch: Path,
    *,
    prepare: Callable[[], None] | None = None,
) -> ForkedCommand:
    """As `run_command`, without waiting for it. What it says goes to files in `scratch`."""
    output, errors = scratch / "output", scratch / "errors"
    process = start_forked(_command, list(arguments), dict(variables), output, errors, prepare)
    return ForkedCommand(process, output, errors)


@contextmanager
def forked_workers() -> Iterator[None]:
    """Has what starts workers in this process fork them."""
    kept = processes.subprocess
    named = {"Popen": ForkedWorker, "DEVNULL": subprocess.DEVNULL, "STDOUT": subprocess.STDOUT}
    processes.subprocess = SimpleNamespace(**named)  # type: ignore[assignment]
    try:
        yield
    finally:
        processes.subprocess = kept


class ForkedWorker:
    """What the launcher needs of `subprocess.Popen`, of a worker that is no child of ours."""

    def __init__(self, arguments: Sequence[str], *, env: Mapping[str, str], stdout: IO[bytes], **_: Any) -> None:
        variables = {name: value for name, value in env.items() if name not in (CONSOLE_VARIABLE, LAUNCHER_VARIABLE)}
        self._process = start_forked(_run_module, list(arguments), variables, Path(stdout.name))
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def take_over(variables: Mapping[str, str], output: Path, errors: Path) -> None:
    """Has this process lead a session, with this environment, and write to these files."""
    os.setsid()
    for path, descriptor in ((output, STDOUT), (errors, STDERR)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    become(variables)


def become(variables: Mapping[str, str]) -> None:
    """Has this process have this environment, as if it had been started with it."""
    os.environ.clear()
    os.environ.update(variables)
    # What was settled when modules were loaded.
    tempfile.tempdir = None
    if "OMP_NUM_THREADS" in variables:
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    gc.freeze()  # what was imported stays, and collecting takes no longer for it


def _command(
    arguments: list[str],
    variables: dict[str, str],
    output: Path,
    errors: Path,
    prepare: Callable[[], None] | None,
) -> None:
    take_over(variables, output, errors)
    if prepare is not None:
        prepare()
    sys.exit(status_of(arguments))


def status_of(arguments: Sequence[str]) -> int:
    """Of `understudy …` in this process, whose workers are forked."""
    with Workers() as workers:
        named = {"Popen": workers.start, "DEVNULL": subprocess.DEVNULL, "STDOUT": subprocess.STDOUT}
        processes.subprocess = SimpleNamespace(**named)  # type: ignore[attr-defined]
        return exit_status(arguments)


class Workers:
    """What forks a command's workers: a process that was forked before the command had done anything."""

    def __init__(self) -> None:
        fork = multiprocessing.get_context("fork")
        self._connection, theirs = fork.Pipe()
        self._process = fork.Process(target=_fork_workers, args=(theirs, self._connection))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()

    def start(self, arguments: Sequence[str], *, env: Mapping[str, str], stdout: IO[bytes], **_: Any) -> Worker:
        return Worker(self, self.ask("start", list(arguments), dict(env), stdout.name))

    def ask(self, *request: Any) -> Any:
        self._connection.send(request)
        return self._connection.recv()


class Worker:
    """What the launcher needs of `subprocess.Popen`."""

    def __init__(self, workers: Workers, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._workers = workers

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._workers.ask("poll", self.pid)
        return self.returncode

    def wait(self) -> int:
        while (status := self.poll()) is None:
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _fork_workers(connection: Connection, theirs: Connection) -> None:
    """Starts workers and tells how they ended, as it is asked, until the command has gone."""
    theirs.close()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # as the launcher does while it starts one
    fork = multiprocessing.get_context("fork")
    started: dict[int, BaseProcess] = {}
    while True:
        try:
            request, *details = connection.recv()
        except EOFError:
            os._exit(0)
        if request == "start":
            process = fork.Process(target=_work, args=details)
            process.start()
            assert process.pid is not None
            started[process.pid] = process
            connection.send(process.pid)
        else:
            connection.send(started[details[0]].exitcode)


def _work(arguments: list[str], variables: dict[str, str], log: str) -> None:
    variables = {**variables, LAUNCHER_VARIABLE: str(os.getppid())}
    if CONSOLE_VARIABLE in variables:
        variables[CONSOLE_VARIABLE] = str(os.dup(STDOUT))
    _run_module(arguments, variables, Path(log))


def _run_module(arguments: list[str], variables: dict[str, str], log: Path) -> None:
    """As `python -m MODULE …`."""
    take_over(variables, log, log)
    _, option, module, *others = arguments
    assert option == "-m"
    sys.argv = [module, *others]
    runpy.run_module(module, run_name="__main__", alter_sys=False)
