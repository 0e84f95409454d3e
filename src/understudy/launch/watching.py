"""Watches a host's processes where another launcher started them, in a process beside theirs: a rank that hangs cannot
do it. `python -m understudy.launch.watching DIRECTORY WORLD_SIZE HANG_SECONDS RANK PARENT`. Imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from understudy.launch.hangs import HangWatch
from understudy.launch.parent import die_with_parent
from understudy.launch.pulses import read_pulse
from understudy.launch.run_directory import RunDirectory
from understudy.launch.signals import SIGNALS
from understudy.launch.stragglers import StragglerWatch
from understudy.recipe.environment import host_name

__all__ = ["main", "start_watching"]

POLL_SECONDS = 0.25
STDERR = 2


def start_watching(directory: RunDirectory, world_size: int, hang_seconds: float, rank: int) -> None:
    """For one process of a host, that with `rank`, from its main thread: from now on, until it ends, a hang is said on
    what is its standard error now, and ends all processes of the run on this host. That of rank 0 names slow ranks."""
    arguments = [str(directory.path), str(world_size), str(hang_seconds), str(rank), str(os.getpid())]
    # Requests to stop may be sent to all processes of a job; this one ends with its parent, which they are for.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        subprocess.Popen(
            [sys.executable, "-m", "understudy.launch.watching", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=STDERR,
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def main() -> None:
    path, world_size, hang_seconds, rank, parent = sys.argv[1:]
    die_with_parent(int(parent))
    directory = RunDirectory(Path(path))
    watch = HangWatch(directory, int(world_size), float(hang_seconds))
    slow = StragglerWatch(directory, int(world_size), _say) if int(rank) == 0 else None
    while os.getppid() == int(parent):
        if slow is not None:
            slow()
        if (hang := watch()) is not None:
            _say(f"error: {hang}")
            _kill(directory, int(world_size), last=int(parent))
            return
        time.sleep(POLL_SECONDS)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _kill(directory: RunDirectory, world_size: int, *, last: int) -> None:
    """The processes of the run on this host, that one at the end: this process goes with it."""
    pulses = [read_pulse(directory.pulse(rank)) for rank in range(world_size)]
    here = {pulse.process for pulse in pulses if pulse is not None and pulse.host == host_name()}
    for process in [*(here - {last}), last]:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main()
