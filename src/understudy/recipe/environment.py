"""Every environment variable the program reads, in one place. Imports no torch."""

from __future__ import annotations

import os
import re
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
    "debugging_variables",
    "extensions_directory",
    "launcher_process",
    "launcher_variables",
    "process_environment",
    "set_build_environment",
    "teacher_key",
    "visible_devices",
]

RENDEZVOUS_VARIABLE = "UNDERSTUDY_RENDEZVOUS"
"""Set by our own local launcher: the `init_method` URL of the process group, a file that needs no port."""

CONSOLE_VARIABLE = "UNDERSTUDY_CONSOLE"
"""Set by our own local launcher for rank 0: the file descriptor of the launcher's own standard output."""

LAUNCHER_VARIABLE = "UNDERSTUDY_LAUNCHER"
"""Set by our own local launcher: its process id."""


_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MARKS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", RENDEZVOUS_VARIABLE)
"""Set for the processes of torchrun and accelerate, of srun, and of our own launcher; nobody sets them by hand."""

_FOR_DEBUGGING = {
    "CUDA_LAUNCH_BLOCKING": ("1", "makes the host wait for every kernel"),
    "ASCEND_LAUNCH_BLOCKING": ("1", "makes the host wait for every kernel"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "checks every collective with another one"),
    "NCCL_P2P_DISABLE": ("1", "sends between GPUs through the host's memory"),
    "NCCL_SHM_DISABLE": ("1", "sends between processes of a host through the network"),
    "NCCL_IB_DISABLE": ("1", "sends between hosts over plain sockets"),
    "TORCH_COMPILE_DISABLE": ("1", "makes `training.compile` do nothing"),
}
"""Variables that are set for debugging and forgotten: the value that does so, and what it then does."""


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


def set_build_environment(extensions: Path, tools: Path) -> None:
    """For compilers that run in this process: compiled extensions go to `extensions`, unless the user named another
    directory, and programs beside `tools` are found even where their environment was not activated."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions))
    directories = os.environ.get("PATH", "").split(os.pathsep)
    if str(tools) not in directories:
        os.environ["PATH"] = os.pathsep.join([*directories, str(tools)])


def extensions_directory() -> Path:
    """Where compiled extensions are; `set_build_environment` came first."""
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])


def chosen_threads() -> int | None:
    """Threads a process, when the user set OMP_NUM_THREADS."""
    return _number(os.environ, "OMP_NUM_THREADS") if "OMP_NUM_THREADS" in os.environ else None


def console_descriptor() -> int | None:
    """The file descriptor our local launcher gave this process to reach the user; None outside of it."""
    return _number(os.environ, CONSOLE_VARIABLE) if CONSOLE_VARIABLE in os.environ else None


def launcher_process() -> int | None:
    """The process id of our local launcher; None outside of it."""
    return _number(os.environ, LAUNCHER_VARIABLE) if LAUNCHER_VARIABLE in os.environ else None


def launcher_variables() -> tuple[dict[str, str], bool]:
    """Those by which a launcher tells a process its place, as they are set here, and whether a launcher left its mark,
    by which they were not set by hand."""
    return {name: os.environ[name] for name in _OF_A_LAUNCHER if name in os.environ}, any(
        mark in os.environ for mark in _MARKS
    )


def debugging_variables() -> dict[str, str]:
    """What is set that makes runs slow: each `NAME=value`, with what it does."""
    return {
        f"{name}={value}": effect
        for name, (value, effect) in _FOR_DEBUGGING.items()
        if os.environ.get(name, "").upper() == value
    }


def process_environment(environ: Mapping[str, str] | None = None) -> ProcessEnvironment | None:
    """The place that torchrun, accelerate, deepspeed, srun or our own launcher gave this process; None outside of them.

    Raises `UserError` when the variables of a launcher are there in part or contradict each other.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        # A step may have fewer tasks than its job, whose number srun leaves in SLURM_NTASKS.
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        names = ("SLURM_PROCID", size, "SLURM_LOCALID")
        if _number(env, size, default=1) == 1:
            return None
    else:
        return None
    rank, world_size = _number(env, names[0]), _number(env, names[1])
    # Where a launcher says nothing of hosts, all processes are on one.
    local_rank = _number(env, names[2], default=rank)
    if names[0] == "RANK":
        # The deepspeed launcher says LOCAL_SIZE.
        local_world_size = _number(env, "LOCAL_WORLD_SIZE", default=_number(env, "LOCAL_SIZE", default=world_size))
    else:
        local_world_size = _slurm_tasks_here(env, default=world_size)
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


def _slurm_tasks_here(env: Mapping[str, str], default: int) -> int:
    """Tasks of this step on this host, from Slurm's list of counts, such as `4(x2),3`, one entry a run of hosts."""
    listed = env.get("SLURM_STEP_TASKS_PER_NODE")
    if listed is None:
        return _number(env, "SLURM_NTASKS_PER_NODE", default=default)
    counts: list[int] = []
    for entry in listed.split(","):
        if (found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)) is None:
            raise UserError(f"the environment variable SLURM_STEP_TASKS_PER_NODE is {listed!r}; it must be counts.")
        counts += [int(found[1])] * int(found[2] or 1)
    node = _number(env, "SLURM_NODEID", default=0)
    if not 0 <= node < len(counts):
        raise UserError(f"SLURM_NODEID={node} lies outside the {len(counts)} hosts of SLURM_STEP_TASKS_PER_NODE.")
    return counts[node]


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in env and default is not None:
        return default
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise UserError(
            f"the environment variable {name} is {env.get(name, 'not set')!r}; it must be a number."
        ) from None


def teacher_key() -> str | None:
    """What a server that teaches wants to be shown, UNDERSTUDY_TEACHER_API_KEY; None when it is not set. A secret: it
    stands in no recipe, no log and no message."""
    key = os.environ.get("UNDERSTUDY_TEACHER_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            "the environment variable UNDERSTUDY_TEACHER_API_KEY has characters that no key has; set it again."
        )
    return key or None


def visible_devices(variable: str) -> str | None:
    """The list by which a vendor's variable, such as CUDA_VISIBLE_DEVICES, hides devices; None when it is not set."""
    return os.environ.get(variable)
