"""Commands in processes that can be killed, without the seconds that importing torch takes each of them."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.distributed.forked import PRELOADED
from understudy.cli.main import exit_status

DEADLINE_SECONDS = 180.0


@dataclass(frozen=True)
class StartedCommand:
    """`understudy …`, leading a process group as in a terminal. Its temporary files go to `scratch`, by which the
    processes that it starts are known."""

    process: BaseProcess
    scratch: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def status(self) -> int:
        """Waits for it; negative for the signal that ended it."""
        self.process.join(DEADLINE_SECONDS)
        assert self.process.exitcode is not None, "the command did not end"
        return self.process.exitcode

    def said(self) -> str:
        return (self.scratch / "output").read_text()

    def errors(self) -> str:
        return (self.scratch / "errors").read_text()

    def workers(self) -> list[int]:
        """The processes that it started and that are still there."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(self.scratch) + b"/" in arguments:
                found.append(int(entry.name))
        return found

    def wait_for_workers_to_end(self) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while left := self.workers():
            assert time.monotonic() < deadline, f"processes {left} outlived their command"
            time.sleep(0.02)


def start(arguments: Sequence[str], scratch: Path, environment: Mapping[str, str]) -> StartedCommand:
    scratch.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(list(arguments), scratch, dict(environment)), daemon=True)
    process.start()
    return StartedCommand(process, scratch)


def _run(arguments: list[str], scratch: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment, TMPDIR=str(scratch))
    tempfile.tempdir = None  # it is remembered from when modules were loaded
    for name, descriptor in (("output", 1), ("errors", 2)):
        with (scratch / name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.exit(exit_status(arguments))
