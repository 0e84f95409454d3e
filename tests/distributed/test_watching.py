"""Where another launcher started the processes, a process of ours on each host ends a run that hangs, and each process
that fails leaves its cause."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.forked import start_forked, take_over
from tests.distributed.small_run import environment, small_recipe, write
from tests.distributed.test_hangs import HANG_SECONDS, plant
from tests.distributed.test_launchers import free_port, launcher
from understudy.cli.main import exit_status
from understudy.strategies.ddp import DDPStrategy

pytestmark = pytest.mark.distributed


def recipe(tmp_path: Path) -> Path:
    small = small_recipe(tmp_path)
    small |= {"evaluation": {}, "cluster": {"processes": 2, "hang_seconds": HANG_SECONDS}}
    small["training"]["max_steps"] = 6
    return write(small, tmp_path)


def train(path: Path, variables: dict[str, str], said: Path, prepare: Callable[[], None]) -> None:
    take_over(variables, said, said)
    prepare()
    sys.exit(exit_status(["train", str(path)]))


def run_as_torchrun_does(tmp_path: Path, prepare: Callable[[], None]) -> tuple[list[int | None], list[str]]:
    """Two processes with its variables: how each ended, and what it said to the launcher."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables = {**environment(tmp_path), **place, "TORCHELASTIC_RUN_ID": "none", "GLOO_SOCKET_IFNAME": "lo"}
    path, started = recipe(tmp_path), []
    for rank in range(2):
        own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(start_forked(train, path, own, tmp_path / f"said-{rank}", prepare))
    deadline = time.monotonic() + 90
    try:
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in started], [(tmp_path / f"said-{i}").read_text() for i in range(2)]
    finally:
        for process in started:
            process.kill()
            process.join()


def watchers(tmp_path: Path) -> list[str]:
    """Processes that watch the run of that directory, and do not end soon."""
    deadline = time.monotonic() + 10
    while True:
        commands = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                commands.append(entry.read_text())
            except OSError:
                continue
        left = [command for command in commands if "launch.watching" in command and str(tmp_path) in command]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def test_a_hang_under_torchrun_is_said_and_ends_all_processes(tmp_path: Path) -> None:
    statuses, said = run_as_torchrun_does(tmp_path, partial(plant, "forward_backward", 3, 1, "stopped"))
    assert statuses == [-signal.SIGKILL] * 2, said
    assert "error: no rank got on for 3 s: rank 1 on " in said[0]
    assert "is stopped (SIGSTOP" in said[0]
    assert not watchers(tmp_path)


def plant_failure() -> None:
    compute, steps = DDPStrategy.forward_backward, 0

    def forward_backward(self: DDPStrategy, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3 and os.environ["RANK"] == "1":
            raise ArithmeticError("planted")
        return compute(self, *arguments)

    DDPStrategy.forward_backward = forward_backward  # type: ignore[method-assign]


def test_each_process_that_fails_under_torchrun_leaves_its_cause(tmp_path: Path) -> None:
    statuses, said = run_as_torchrun_does(tmp_path, plant_failure)
    assert 0 not in statuses
    assert [line.partition(" on ")[0] for text in said for line in text.splitlines() if "error" in line] == [
        "error: ArithmeticError: planted (rank 1"
    ]
    assert "after step 2; traceback in " in said[1]
    assert re.search(r"; last collectives: all_reduce \d+ (not )?done: rank 1; by last pulses, ", said[1])
    causes = [json.loads((tmp_path / f"run/logs/rank-{rank}.cause.json").read_text()) for rank in range(2)]
    assert [cause["peer_failed"] for cause in causes] == [True, False]
    assert causes[1]["message"] == "ArithmeticError: planted"
    assert not watchers(tmp_path)


def training_process(pulse: Path) -> int:
    """The one that tells of itself there, once it has trained a step."""
    deadline = time.monotonic() + 180
    while not (pulse.exists() and json.loads(pulse.read_text())["step"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return int(json.loads(pulse.read_text())["process"])


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["torchrun", "accelerate", "deepspeed"])
def test_every_launcher_ends_with_a_hang_that_is_said(name: str, tmp_path: Path) -> None:
    path = recipe(tmp_path)
    started = subprocess.Popen(
        [*launcher(name), "understudy", "train", str(path), "training.max_steps=100000"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        os.kill(training_process(tmp_path / "run" / "logs" / "rank-1.pulse.json"), signal.SIGSTOP)
        _, errors = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode != 0
    assert errors.count("error: no rank got on for 3 s: rank 1 on ") == 1
    assert not watchers(tmp_path)
