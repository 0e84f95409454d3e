"""Jobs under a real Slurm of two hosts: they run to the end, and come back from their last checkpoint."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.slurm import Slurm, slurm
from tests.distributed.small_run import environment, rows, small_recipe, write

pytestmark = pytest.mark.distributed

BIN = Path(sys.executable).parent
STEPS = 150


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as made:
        yield made


def recipe_of(directory: Path, steps: int = STEPS) -> Path:
    recipe = small_recipe(directory)
    recipe |= {"evaluation": {}, "cluster": {"processes": 1, "max_restarts": 3}}
    recipe["training"]["max_steps"] = steps
    recipe["checkpoint"] = {"every": 50}
    return write(recipe, directory)


def submit(cluster: Slurm, recipe: Path, *options: str) -> str:
    told = {**environment(recipe.parent), **cluster.environment}
    command = [str(BIN / "understudy"), "submit", str(recipe), "--nodes", "2", "--log-dir", str(recipe.parent / "out")]
    command += options
    done = subprocess.run(command, env=told, capture_output=True, text=True, timeout=60, cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def finish(cluster: Slurm, job: str, directory: Path, restarts: int) -> dict[int, float]:
    fields = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    output = "\n".join(path.read_text() for path in (directory / "out").glob("*"))
    assert (fields["JobState"], int(fields["Restarts"])) == ("COMPLETED", restarts), f"{fields}\n{output}"
    return losses(directory)


def losses(directory: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(directory) if "loss" in row}


def wait_for_step(directory: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while not (directory / "run" / "metrics.jsonl").exists() or max(losses(directory), default=0) < step:
        assert time.monotonic() < deadline, [path.read_text() for path in (directory / "out").glob("*")]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def uninterrupted(cluster: Slurm, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    directory = tmp_path_factory.mktemp("whole")
    return finish(cluster, submit(cluster, recipe_of(directory)), directory, restarts=0)


def interrupt(how: str, cluster: Slurm, job: str) -> None:
    if how == "signal":
        cluster.run("scancel", "--signal=USR1", job)
    elif how == "preemption":
        other = cluster.run(
            "sbatch", "--parsable", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true"
        )
        cluster.wait_for(other.strip(), "COMPLETED")
    elif how == "lost host":
        cluster.kill_host("n2")
        time.sleep(1)
        cluster.start_host("n2")


@pytest.mark.parametrize("how", ["signal", "preemption", "lost host"])
def test_a_job_that_is_interrupted_comes_back_and_ends_as_one_that_is_not(
    how: str, cluster: Slurm, uninterrupted: dict[int, float], tmp_path: Path
) -> None:
    job = submit(cluster, recipe_of(tmp_path))
    wait_for_step(tmp_path, 20)
    interrupt(how, cluster, job)
    assert finish(cluster, job, tmp_path, restarts=1) == pytest.approx(uninterrupted, rel=1e-6)
