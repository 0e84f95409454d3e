"""The place that a launcher's variables give a process, or a host, among its peers. Pure; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from understudy.errors import UserError

__all__ = ["HostEnvironment", "ProcessEnvironment", "asked_processes", "number", "place_of_host", "place_of_process"]

_PORTS = range(20_000, 32_000)
"""Of steps under srun that were given none."""


@dataclass(frozen=True)
class ProcessEnvironment:
    """This process's place among its peers, as a launcher told it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    rendezvous: str
    """`init_method` for torch.distributed, env://, tcp://… or file://…; or a store that is there already, and a name
    for this start in it: store://ADDRESS:PORT/NAME"""
    master: str | None = None
    """The first host's name or address; None where all processes are on this one."""


@dataclass(frozen=True)
class HostEnvironment:
    """This host's place among those that run a job together, each with processes that it starts itself."""

    node: int
    """From 0; the first one leads."""
    nodes: int
    processes: int | None
    """To start here; None where nobody said."""
    address: str
    """Of the first host, and"""
    port: int
    """where all meet there."""


def place_of_process(env: Mapping[str, str], rendezvous_variable: str) -> ProcessEnvironment | None:
    """The place that torchrun, accelerate, deepspeed, srun or our own launcher gave this process; None outside of them.

    Raises `UserError` when the variables of a launcher are there in part or contradict each other.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif _in_slurm_step(env) and not _one_launcher_a_host(env):
        # A step may have fewer tasks than its job, whose number srun leaves in SLURM_NTASKS.
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        names = ("SLURM_PROCID", size, "SLURM_LOCALID")
        if number(env, size, default=1) == 1:
            return None
    else:
        return None
    rank, world_size = number(env, names[0]), number(env, names[1])
    # Where a launcher says nothing of hosts, all processes are on one.
    local_rank = number(env, names[2], default=rank)
    if names[0] == "RANK":
        # The deepspeed launcher says LOCAL_SIZE.
        local_world_size = number(env, "LOCAL_WORLD_SIZE", default=number(env, "LOCAL_SIZE", default=world_size))
    else:
        local_world_size = _slurm_tasks_here(env, default=world_size)
    if not 0 <= rank < world_size:
        raise UserError(
            f"{names[0]}={rank} lies outside {names[1]}={world_size}; the launcher must set 0 ≤ rank < size."
        )
    if (own := env.get(rendezvous_variable)) is not None:
        return ProcessEnvironment(rank, world_size, local_rank, local_world_size, own, env.get("MASTER_ADDR"))
    given = {name: env[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in env}
    if len(given) < 2 and names[0] == "SLURM_PROCID":
        address = given.get("MASTER_ADDR") or _first_slurm_host(env)
        port = given.get("MASTER_PORT") or str(_slurm_port(env))
        meeting = f"tcp://{address}:{port}"
        return ProcessEnvironment(rank, world_size, local_rank, local_world_size, meeting, address)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in given and world_size > 1:
            raise UserError(
                f"{names[1]}={world_size} but {name} is not set; set it to the first host's address or port."
            )
    return ProcessEnvironment(rank, world_size, local_rank, local_world_size, "env://", given.get("MASTER_ADDR"))


def place_of_host(env: Mapping[str, str]) -> HostEnvironment | None:
    """The place that NNODES, NODE_RANK (or RANK, or a Slurm step of one task a host), MASTER_ADDR and MASTER_PORT give
    this host; None where NNODES is not set, or is 1, or a launcher started this very process.

    Raises `UserError` when they are there in part or contradict each other.
    """
    if "NNODES" not in env or ("RANK" in env and "WORLD_SIZE" in env):
        return None
    nodes = number(env, "NNODES")
    if nodes < 1:
        raise UserError(f"NNODES={nodes}; it is the number of hosts, 1 or more.")
    node = _node_rank(env, nodes)
    if nodes == 1:
        return None
    for name, what in (
        ("MASTER_ADDR", "the first host's name or address"),
        ("MASTER_PORT", "a port that is free there"),
    ):
        if not env.get(name):
            raise UserError(f"NNODES={nodes} but {name} is not set; set it to {what}, the same on every host.")
    port = number(env, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT={port}; a port is a number from 1 to 65535.")
    return HostEnvironment(node, nodes, asked_processes(env), env["MASTER_ADDR"], port)


def asked_processes(env: Mapping[str, str]) -> int | None:
    """NPROC_PER_NODE: processes to start on this host; None where it is not set or leaves the choice."""
    if env.get("NPROC_PER_NODE", "auto") in ("auto", "gpu"):
        return None
    asked = env["NPROC_PER_NODE"]
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError(
            f"NPROC_PER_NODE={asked}; it is the number of processes a host, 1 or more, or auto or gpu for one a device."
        )
    return int(asked)


def number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The variable as a number. Raises `UserError` where it is none, or not set and without `default`."""
    if name not in env and default is not None:
        return default
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise UserError(
            f"the environment variable {name} is {env.get(name, 'not set')!r}; it must be a number."
        ) from None


def _node_rank(env: Mapping[str, str], nodes: int) -> int:
    """Of this host. LLaMA-Factory calls it RANK."""
    given = {name: number(env, name) for name in ("NODE_RANK", "RANK") if name in env}
    if not given and _in_slurm_step(env):
        given = {"SLURM_NODEID": number(env, "SLURM_NODEID")}
    if not given:
        if nodes == 1:
            return 0
        raise UserError(f"NNODES={nodes} but NODE_RANK is not set; set it to 0 on the first host, 1 on the next, …")
    if len(set(given.values())) > 1:
        told = " and ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{told} contradict each other; without WORLD_SIZE both are the host's number. Unset RANK.")
    name, node = next(iter(given.items()))
    if not 0 <= node < nodes:
        raise UserError(f"{name}={node} lies outside NNODES={nodes}; the hosts are numbered from 0 to {nodes - 1}.")
    return node


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in env and "SLURM_STEP_ID" in env


def _one_launcher_a_host(env: Mapping[str, str]) -> bool:
    """Whether NNODES is meant for this step: it has one task a host."""
    tasks = number(env, "SLURM_STEP_NUM_TASKS", default=number(env, "SLURM_NTASKS", default=1))
    return "NNODES" in env and tasks == number(env, "SLURM_STEP_NUM_NODES", default=tasks)


def _slurm_tasks_here(env: Mapping[str, str], default: int) -> int:
    """Tasks of this step on this host, from Slurm's list of counts, such as `4(x2),3`, one entry a run of hosts."""
    listed = env.get("SLURM_STEP_TASKS_PER_NODE")
    if listed is None:
        return number(env, "SLURM_NTASKS_PER_NODE", default=default)
    counts: list[int] = []
    for entry in listed.split(","):
        if (found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)) is None:
            raise UserError(f"the environment variable SLURM_STEP_TASKS_PER_NODE is {listed!r}; it must be counts.")
        counts += [int(found[1])] * int(found[2] or 1)
    node = number(env, "SLURM_NODEID", default=0)
    if not 0 <= node < len(counts):
        raise UserError(f"SLURM_NODEID={node} lies outside the {len(counts)} hosts of SLURM_STEP_TASKS_PER_NODE.")
    return counts[node]


def _first_slurm_host(env: Mapping[str, str]) -> str:
    """Of the step's list of hosts, such as `gpu[03-06,9],login`: the one with the task of rank 0."""
    listed = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    if (found := re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\]([^,\[\]]*))?", listed)) is None:
        raise UserError(
            f"SLURM_STEP_NODELIST is {listed!r}, which names no host; set MASTER_ADDR to the first host's address."
        )
    return found[1] + (found[2] or "") + (found[3] or "")


def _slurm_port(env: Mapping[str, str]) -> int:
    """The same on every host, and another one for another step."""
    number_of_step = number(env, "SLURM_JOB_ID", default=0) + number(env, "SLURM_STEP_ID", default=0)
    return _PORTS[number_of_step % len(_PORTS)]
