"""Runs checks so that none can take another, or this process, down with it. Imports no torch.

A check that can hang or crash runs in a process of its own, under a time limit. A few run side by side; one that
measures runs when nothing else does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from understudy.diagnosis.check import Check, Finding, Host
from understudy.errors import UserError
from understudy.recipe.environment import child_environment

__all__ = ["Result", "find_safely", "run_checks"]

POLL_SECONDS = 0.02
KILLED_SECONDS = 5.0
"""A process stuck in the kernel, on a file server that is gone, does not end when it is killed; it is left behind."""
SIDE_BY_SIDE = 4
WORD_CHARACTERS = 300
IMPORT = "A package cannot be imported: see what the check `imports` says."
START = "See `process-limit` and `host-memory`; end processes that are not needed, and run this again."


@dataclass(frozen=True)
class Result:
    name: str
    finding: Finding
    seconds: float


def run_checks(
    checks: Sequence[Check], host: Host, watch: Callable[[Sequence[str]], None] = lambda running: None
) -> Iterator[Result]:
    """Each check's result, as soon as it is there; `watch` is given the names of those that run whenever they change.

    Leaving the iterator early ends what still runs.
    """
    apart = [each for each in checks if each.seconds is not None]
    waiting = [each for each in apart if not each.alone] + [each for each in apart if each.alone]
    running: list[_Running] = []
    with tempfile.TemporaryDirectory(prefix="understudy-doctor-", ignore_cleanup_errors=True) as scratch:
        try:
            failed = _start(waiting, running, host, Path(scratch))
            watch([each.check.name for each in running])
            for here in checks:
                if here.seconds is None:
                    began = time.monotonic()
                    yield Result(here.name, find_safely(here, host), time.monotonic() - began)
            yield from failed
            while running:
                time.sleep(POLL_SECONDS)
                done = [each for each in running if each.over()]
                if not done:
                    continue
                running[:] = [each for each in running if each not in done]
                failed = _start(waiting, running, host, Path(scratch))
                watch([each.check.name for each in running])
                yield from (each.result() for each in done)
                yield from failed
        finally:
            for each in running:
                each.end()


def find_safely(check: Check, host: Host) -> Finding:
    """What `check` finds; a failure of the check itself is a finding as well."""
    try:
        return check.find(host)
    # Whatever it raises is what was found out: nothing is hidden, and the other checks go on.
    except Exception as error:  # noqa: BLE001
        words = (str(error).strip().splitlines() or [""])[0]
        found = words if isinstance(error, UserError) else f"{type(error).__name__}: {words}".removesuffix(": ")
        fix = IMPORT if check.name != "imports" and _while_importing(error) else check.if_lost
        return Finding(check.lost_is, _shortened(found), fix, {"traceback": "".join(traceback.format_exception(error))})


def _start(waiting: list[Check], running: list[_Running], host: Host, scratch: Path) -> list[Result]:
    """Moves as many from `waiting` to `running` as may run now; gives back those that no process can be had for."""
    failed = []
    while waiting and _may_start(waiting[0], running):
        check = waiting.pop(0)
        try:
            running.append(_Running(check, host, scratch))
        except OSError as error:
            found = f"no process can be started for the check ({error.strerror})"
            failed.append(Result(check.name, Finding(check.lost_is, found, START), 0.0))
    return failed


def _may_start(check: Check, running: Sequence[_Running]) -> bool:
    if not running:
        return True
    return not check.alone and len(running) < min(SIDE_BY_SIDE, os.cpu_count() or 1)


class _Running:
    """A check in a process that leads a session of its own, so that it can be ended with all that it started."""

    def __init__(self, check: Check, host: Host, scratch: Path) -> None:
        self.check = check
        self._report = scratch / f"{check.name}.json"
        self._log = scratch / f"{check.name}.log"
        self._began = time.monotonic()
        arguments = [check.name, str(self._report), str(os.getpid()), str(host.root), str(host.processes or "")]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "understudy.diagnosis.child", *arguments],
                env=child_environment({"TMPDIR": str(scratch)}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def over(self) -> bool:
        assert self.check.seconds is not None, "what has no limit runs in this process"
        return self._process.poll() is not None or time.monotonic() - self._began > self.check.seconds

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(KILLED_SECONDS)

    def result(self) -> Result:
        seconds, status = time.monotonic() - self._began, self._process.poll()
        self.end()
        try:
            report = json.loads(self._report.read_bytes())
        except FileNotFoundError:
            return Result(self.check.name, self._lost(status), seconds)
        return Result(self.check.name, Finding(**report), seconds)

    def _lost(self, status: int | None) -> Finding:
        output = self._log.read_text(encoding="utf-8", errors="replace").strip()
        if status is None:
            found = f"the check was not over after {self.check.seconds:.0f} s, and was ended"
        elif status < 0:
            found = f"the check was ended by {signal.Signals(-status).name}"
        else:
            found = f"the check ended with status {status}"
        if output:
            found += f"; it said last: {_shortened(output.splitlines()[-1].strip())}"
        return Finding(self.check.lost_is, found, self.check.if_lost, {"output": output[-4000:]})


def _while_importing(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ImportError) or any(frame.name == "<module>" for frame in frames)


def _shortened(words: str) -> str:
    return words if len(words) <= WORD_CHARACTERS else f"{words[:WORD_CHARACTERS]} …"
