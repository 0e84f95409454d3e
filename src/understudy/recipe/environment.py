"""Every environment variable the program reads, in one place. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from understudy.errors import UserError

__all__ = [
    "CONSOLE_VARIABLE",
    "LAUNCHER_VARIABLE",
    "RENDEZVOUS_VARIABLE",
    "ProcessEnvironment",
    "cache_directory",
    "child_environment",
    "chosen_threads",
    "console_descriptor",
    "launcher_process",
    "process_environment",
    "visible_devices",
]

RENDEZVOUS_VARIABLE = "UNDERSTUDY_RENDEZVOUS"
"""Set by our own local launcher: the `init_method` URL of the process group, a file that needs no port."""

CONSOLE_VARIABLE = "UNDERSTUDY_CONSOLE"
"""Set by our own local launcher for rank 0: the file descriptor of the launcher's own standard output."""

LAUNCHER_VARIABLE = "UNDERSTUDY_LAUNCHER"
"""Set by our own local launcher: its process id."""


@dataclass(frozen=True)
class ProcessEnvironment:
    """This process's place among its peers, as a launcher told it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    rendezvous: str
    """`init_method` for torch.distributed: env:// or file://…"""


def cache_directory() -> Path:
    """Where prepared data and materialised weights are kept: UNDERSTUDY_CACHE, else XDG_CACHE_HOME, else ~/.cache."""
    if explicit := os.environ.get("UNDERSTUDY_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "understudy"


def child_environment(additions: Mapping[str, str]) -> dict[str, str]:
    """What a process that we start gets: all that we got, and `additions`."""
    return {**os.environ, **additions}


def chosen_threads() -> int | None:
    """Threads a process, when the user set OMP_NUM_THREADS."""
    return _number(os.environ, "OMP_NUM_THREADS") if "OMP_NUM_THREADS" in os.environ else None


def console_descriptor() -> int | None:
    """The file descriptor our local launcher gave this process to reach the user; None outside of it."""
    return _number(os.environ, CONSOLE_VARIABLE) if CONSOLE_VARIABLE in os.environ else None


def launcher_process() -> int | None:
    """The process id of our local launcher; None outside of it."""
    return _number(os.environ, LAUNCHER_VARIABLE) if LAUNCHER_VARIABLE in os.environ else None


def process_environment(environ: Mapping[str, str] | None = None) -> ProcessEnvironment | None:
    """The place that torchrun, accelerate, deepspeed, srun or our own launcher gave this process; None outside of them.

    Raises `UserError` when the variables of a launcher are there in part or contradict each other.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    else:
        return None
    rank, world_size = _number(env, names[0]), _number(env, names[1])
    # The deepspeed launcher sets no LOCAL_WORLD_SIZE and srun often no tasks per node: then all are on one host.
    local_rank = _number(env, names[2], default=rank)
    local_world_size = _number(env, names[3], default=_number(env, "LOCAL_SIZE", default=world_size))
    if not 0 <= rank < world_size:
        raise UserError(
            f"{names[0]}={rank} lies outside {names[1]}={world_size}; the launcher must set 0 ≤ rank < size."
        )
    rendezvous = env.get(RENDEZVOUS_VARIABLE, "env://")
    if rendezvous == "env://" and world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in env:
                raise UserError(
                    f"{names[1]}={world_size} but {name} is not set; set it to the first host's address or port."
                )
    return ProcessEnvironment(rank, world_size, local_rank, local_world_size, rendezvous)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in env and default is not None:
        return default
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise UserError(
            f"the environment variable {name} is {env.get(name, 'not set')!r}; it must be a number."
        ) from None


def visible_devices(variable: str) -> str | None:
    """The list by which a vendor's variable, such as CUDA_VISIBLE_DEVICES, hides devices; None when it is not set."""
    return os.environ.get(variable)
