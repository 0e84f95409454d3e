"""The place among its peers that each launcher gives a process."""

from __future__ import annotations

import pytest

from understudy.errors import UserError
from understudy.recipe.environment import ProcessEnvironment, process_environment
from understudy.recipe.place import HostEnvironment, place_of_host

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
    assert process_environment(variables) == ProcessEnvironment(5, 8, 1, 4, "env://", "node1")


def test_deepspeed_names_the_size_on_this_host_otherwise() -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", **MASTER}
    assert process_environment(variables) == ProcessEnvironment(5, 8, 1, 4, "env://", "node1")


def test_srun_gives_tasks_of_several_hosts_their_places() -> None:
    assert process_environment(slurm()) == ProcessEnvironment(6, 8, 2, 4, "env://", "node1")


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
    assert process_environment(slurm(**variables)) == ProcessEnvironment(1, 2, 1, 2, "env://", "node1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_STEP_NODELIST": "[1-2]", "MASTER_ADDR": None}, "names no host; set MASTER_ADDR"),
        ({"SLURM_PROCID": "8"}, "SLURM_PROCID=8 lies outside"),
        ({"SLURM_LOCALID": "two"}, "SLURM_LOCALID is 'two'"),
    ],
)
def test_variables_that_are_missing_or_contradict_are_refused(changes: dict[str, str | None], message: str) -> None:
    variables = {name: value for name, value in (slurm() | changes).items() if value is not None}
    with pytest.raises(UserError, match=message):
        process_environment(variables)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_torchrun_over_hosts_says_where_they_meet(missing: str) -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MASTER}
    del variables[missing]
    with pytest.raises(UserError, match=f"{missing} is not set"):
        process_environment(variables)


@pytest.mark.parametrize(
    ("hosts", "first"), [("gpu[03-06,9]", "gpu03"), ("login,gpu1", "login"), ("n[1,3]-ib", "n1-ib"), ("alone", "alone")]
)
def test_tasks_of_srun_meet_at_the_first_host_on_a_port_of_their_step(hosts: str, first: str) -> None:
    variables = slurm(SLURM_STEP_NODELIST=hosts)
    del variables["MASTER_ADDR"], variables["MASTER_PORT"]
    place, other = (process_environment({**variables, "SLURM_STEP_ID": step}) for step in ("0", "1"))
    assert place is not None
    assert other is not None
    assert (place.rendezvous, place.master) == (f"tcp://{first}:20077", first)
    assert other.rendezvous == f"tcp://{first}:20078"


HOST = {"NNODES": "2", "NODE_RANK": "1", **MASTER}


def test_a_host_is_told_its_place_among_hosts() -> None:
    assert place_of_host(HOST) == HostEnvironment(1, 2, None, "node1", 29500)
    assert place_of_host({**HOST, "NPROC_PER_NODE": "4"}) == HostEnvironment(1, 2, 4, "node1", 29500)
    assert place_of_host({**HOST, "NPROC_PER_NODE": "gpu"}) == HostEnvironment(1, 2, None, "node1", 29500)
    assert process_environment(HOST) is None


def test_the_number_of_a_host_may_be_called_rank_or_be_slurms() -> None:
    del (variables := dict(HOST))["NODE_RANK"]
    assert place_of_host({**variables, "RANK": "1"}) == HostEnvironment(1, 2, None, "node1", 29500)
    step = slurm(SLURM_STEP_NUM_TASKS="2", SLURM_NTASKS="2", SLURM_PROCID="1", SLURM_NODEID="1")
    assert place_of_host({**variables, **step}) == HostEnvironment(1, 2, None, "node1", 29500)
    assert process_environment({**variables, **step}) is None


def test_one_host_needs_no_place_and_a_process_of_a_launcher_is_no_host() -> None:
    assert place_of_host({}) is None
    assert place_of_host({"NNODES": "1"}) is None
    assert place_of_host({**HOST, "RANK": "3", "WORLD_SIZE": "8"}) is None


def test_tasks_of_srun_on_several_hosts_stay_processes_where_a_script_happens_to_set_nnodes() -> None:
    place = process_environment(slurm(NNODES="2"))
    assert place is not None
    assert place.rank == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NODE_RANK": None}, "NNODES=2 but NODE_RANK is not set"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2 lies outside NNODES=2; the hosts are numbered from 0 to 1"),
        ({"NODE_RANK": "-1"}, "NODE_RANK=-1 lies outside"),
        ({"RANK": "0"}, "NODE_RANK=1 and RANK=0 contradict each other"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set; set it to the first host's"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set; set it to a port"),
        ({"MASTER_PORT": "99999"}, "a port is a number from 1 to 65535"),
        ({"NNODES": "none"}, "NNODES is 'none'; it must be a number"),
        ({"NNODES": "0"}, "NNODES=0; it is the number of hosts"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0; it is the number of processes"),
        (
            {"NPROC_PER_NODE": "cpu"},
            "NPROC_PER_NODE=cpu; it is the number of processes a host, 1 or more, or auto or gpu",
        ),
    ],
)
def test_a_place_that_is_told_in_part_or_contradicts_itself_is_refused(
    changes: dict[str, str | None], message: str
) -> None:
    variables = {name: value for name, value in (HOST | changes).items() if value is not None}
    with pytest.raises(UserError, match=message):
        place_of_host(variables)
