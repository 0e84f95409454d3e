"""Jobs under a real Slurm of two hosts: they run to the end, and come back from their last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.slurm import Slurm, slurm
from tests.distributed.small_run import environment, small_recipe, understudy, write
from understudy.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.distributed

BIN = Path(sys.executable).parent
STEPS = 400
SIGNAL_SECONDS = 100
"""Before a time limit that is one to two minutes ahead: the next time that Slurm looks at limits, twice a minute."""
LOST = {"lost first host": "n1", "lost host": "n2"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """By launchers of ours, without Slurm."""
    directory = tmp_path_factory.mktemp("whole")
    done = understudy(["train", str(recipe_of(directory)), "cluster.processes=2"], directory)
    assert done.returncode == 0, done.stderr
    return losses(directory)


def recipe_of(directory: Path) -> Path:
    recipe: dict[str, Any] = small_recipe(directory)
    recipe |= {"evaluation": {}, "cluster": {"processes": 1, "max_restarts": 2}}
    recipe["training"]["max_steps"] = STEPS
    recipe["checkpoint"] = {"every": 20}
    recipe["logging"] = {"sinks": ["jsonl"]}
    return write(recipe, directory)


def submit(cluster: Slurm, recipe: Path) -> str:
    told = {**environment(recipe.parent), **cluster.environment}
    command = [str(BIN / "understudy"), "submit", str(recipe), "--nodes", "2", "--log-dir", str(recipe.parent / "out")]
    command += ["--time", "1-00:00", "--signal-seconds", str(SIGNAL_SECONDS)]
    done = subprocess.run(command, env=told, capture_output=True, text=True, timeout=60, cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def losses(directory: Path) -> dict[int, float]:
    """As far as they are written."""
    file = directory / "run" / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    written = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return {row["step"]: row["loss"] for row in written if "loss" in row}


def committed(directory: Path) -> int:
    """The step of the newest checkpoint that is whole."""
    newest = CheckpointStore(directory / "run" / "checkpoints").committed()
    return max((int(path.name.rpartition("-")[2]) for path in newest), default=0)


def wait(until: Callable[[], bool], directory: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, [path.read_text() for path in (directory / "out").glob("*")]
        time.sleep(0.02)


def workers(directory: Path) -> list[int]:
    """The processes that train there."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "understudy.training.worker" in command and str(directory / "run") in command:
            found.append(int(entry.name))
    return found


@contextmanager
def held_up(directory: Path) -> Iterator[None]:
    """Training waits while inside, so that it is not over before Slurm interrupts it."""
    held = workers(directory)
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in held:
        with suppress(ProcessLookupError):  # it was on the host that is lost
            os.kill(pid, signal.SIGCONT)


def interrupt(how: str, cluster: Slurm, job: str, directory: Path) -> None:
    with held_up(directory):
        if how == "signal":
            cluster.run("scancel", "--signal=USR1", job)
        elif how == "time limit":
            began = datetime.fromisoformat(cluster.job(job)["StartTime"])
            minutes = (datetime.now() - began).total_seconds() // 60
            cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2:.0f}")
            wait(lambda: cluster.is_told("warning signal", job), directory)
        elif how.startswith("preemption"):
            cluster.run("scontrol", "update", "PartitionName=low", f"GraceTime={0 if 'without' in how else 60}")
            cluster.run(
                "sbatch", f"--chdir={directory}", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true"
            )
            wait(lambda: cluster.is_told("preempt", job), directory)
        else:
            cluster.kill_host(LOST[how])
    if how in LOST:
        wait(lambda: cluster.is_told("due to failure of node", job) or cluster.is_told("Requeuing", job), directory)
        cluster.start_host(LOST[how])
    wait(lambda: cluster.is_told("Requeuing", job), directory)
    if how == "time limit":
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1-0")


def check_interruptions(
    kinds: list[str], at: int, cluster: Slurm, uninterrupted: dict[int, float], directory: Path
) -> None:
    """A job that is interrupted in each way, `at` steps after it went on."""
    job = submit(cluster, recipe_of(directory))
    begun = 0
    for how in kinds:
        # Each start begins the metrics where its checkpoint ends, before it starts workers.
        wait(lambda: len(workers(directory)) == 2, directory)
        wait(lambda: max(losses(directory), default=0) >= begun + at, directory)  # noqa: B023
        interrupt(how, cluster, job, directory)
        if how not in LOST:
            assert committed(directory) == max(losses(directory)), how
        begun = committed(directory)
    fields = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    output = "\n".join(path.read_text() for path in (directory / "out").glob("*"))
    assert (fields["JobState"], int(fields["Restarts"])) == ("COMPLETED", len(kinds)), f"{fields}\n{output}"
    assert losses(directory) == pytest.approx(uninterrupted, rel=1e-6)


def test_a_job_that_is_interrupted_in_every_way_comes_back_and_ends_as_one_that_is_not(
    cluster: Slurm, uninterrupted: dict[int, float], tmp_path: Path
) -> None:
    check_interruptions(["signal", "time limit", "preemption", "lost host"], 20, cluster, uninterrupted, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("number", range(10))
def test_interruptions_in_any_order_and_at_any_step_are_made_good(
    number: int, cluster: Slurm, uninterrupted: dict[int, float], tmp_path: Path
) -> None:
    variants = ["preemption", "lost host"] if number % 2 else ["preemption without grace", "lost first host"]
    kinds = ["signal", "time limit", *variants]
    first = number % len(kinds)
    check_interruptions(kinds[first:] + kinds[:first], 1 + 7 * number, cluster, uninterrupted, tmp_path)
