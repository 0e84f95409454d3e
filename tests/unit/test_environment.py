"""The place among its peers that each launcher gives a process."""

from __future__ import annotations

import pytest

from understudy.errors import UserError
from understudy.recipe.environment import ProcessEnvironment, process_environment

pytestmark = pytest.mark.unit

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def slurm(**variables: str) -> dict[str, str]:
    """What `srun --nodes 2 --ntasks-per-node 4` gives its task 6, the third of the second host."""
    step = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "6",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "2",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    }
    return {**step, **MASTER, **variables}


def test_without_a_launcher_there_is_no_place() -> None:
    assert process_environment({}) is None
    assert process_environment(MASTER) is None


def test_torchrun_gives_rank_and_size_over_all_hosts_and_on_this_one() -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **MASTER}
    assert process_environment(variables) == ProcessEnvironment(5, 8, 1, 4, "env://")


def test_deepspeed_names_the_size_on_this_host_otherwise() -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", **MASTER}
    assert process_environment(variables) == ProcessEnvironment(5, 8, 1, 4, "env://")


def test_srun_gives_tasks_of_several_hosts_their_places() -> None:
    assert process_environment(slurm()) == ProcessEnvironment(6, 8, 2, 4, "env://")


@pytest.mark.parametrize(
    ("per_node", "node", "expected"), [("3(x2),2", "0", 3), ("3(x2),2", "1", 3), ("3(x2),2", "2", 2), ("8", "0", 8)]
)
def test_srun_says_how_many_tasks_each_host_has(per_node: str, node: str, expected: int) -> None:
    place = process_environment(slurm(SLURM_STEP_TASKS_PER_NODE=per_node, SLURM_NODEID=node, SLURM_LOCALID="0"))
    assert place is not None
    assert place.local_world_size == expected


def test_a_step_of_fewer_tasks_than_its_job_counts_its_own() -> None:
    """`sbatch --ntasks 16`, then `srun --ntasks 8`: srun leaves the job's SLURM_NTASKS where it was set before."""
    place = process_environment(slurm(SLURM_NTASKS="16"))
    assert place is not None
    assert place.world_size == 8


def test_one_task_or_an_allocation_without_a_step_starts_processes_by_itself() -> None:
    assert process_environment(slurm(SLURM_PROCID="0", SLURM_NTASKS="1", SLURM_STEP_NUM_TASKS="1")) is None
    assert process_environment({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None


def test_torchrun_inside_srun_is_believed() -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert process_environment(slurm(**variables)) == ProcessEnvironment(1, 2, 1, 2, "env://")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"SLURM_PROCID": "8"}, "SLURM_PROCID=8 lies outside"),
        ({"SLURM_LOCALID": "two"}, "SLURM_LOCALID is 'two'"),
    ],
)
def test_variables_that_are_missing_or_contradict_are_refused(changes: dict[str, str | None], message: str) -> None:
    variables = {name: value for name, value in (slurm() | changes).items() if value is not None}
    with pytest.raises(UserError, match=message):
        process_environment(variables)
