"""`understudy train` several times over in one process, whose workers are forked from one that has imported all they
need: without the seconds that this takes each of them.

    python -m tests.distributed.forked_train RECIPE OVERRIDES…

Each of OVERRIDES, a list in JSON, is a run. At last its line `statuses […]` tells how they ended.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import click

from tests.distributed import starving_rank
from understudy.cli.main import exit_status
from understudy.launch import processes
from understudy.recipe.environment import CONSOLE_VARIABLE, LAUNCHER_VARIABLE

PRELOADED = ["understudy.training.worker", "transformers.models.llama.modeling_llama", "deepspeed"]
STARVING_VARIABLE = "STARVING_RANK_NOTES"
"""Set to a directory, it has rank 1 run out of memory."""
CONTEXT = multiprocessing.get_context("forkserver")


class ForkedWorker:
    """What the launcher needs of `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], *, env: Mapping[str, str], stdout: IO[bytes], **_: Any) -> None:
        # A fork is no child of the launcher's, and has no descriptor of its.
        variables = {name: env[name] for name in env if name not in (CONSOLE_VARIABLE, LAUNCHER_VARIABLE)}
        self._process = CONTEXT.Process(target=work, args=(list(arguments), variables, stdout.name))
        self._process.start()
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
        os.kill(self._process.pid or 0, number)


def work(arguments: list[str], variables: dict[str, str], log: str) -> None:
    os.setsid()
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(variables)
    assert arguments[1] == "-m"
    if (notes := variables.get(STARVING_VARIABLE)) is not None:
        starving_rank.plant(1, Path(notes))
    sys.argv = arguments[2:]
    runpy.run_module(arguments[2], run_name="__main__", alter_sys=False)


def main() -> None:
    CONTEXT.set_forkserver_preload(PRELOADED)
    named = {"Popen": ForkedWorker, "DEVNULL": subprocess.DEVNULL, "STDOUT": subprocess.STDOUT}
    processes.subprocess = SimpleNamespace(**named)  # type: ignore[attr-defined]
    recipe, *runs = sys.argv[1:]
    statuses = [exit_status(["train", recipe, *json.loads(overrides)]) for overrides in runs]
    click.echo(f"statuses {statuses}")


if __name__ == "__main__":
    main()
