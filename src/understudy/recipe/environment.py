"""Every environment variable the program reads, in one place. Imports no torch."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from understudy.errors import UserError
from understudy.recipe.place import (
    HostEnvironment,
    ProcessEnvironment,
    asked_processes,
    number,
    place_of_host,
    place_of_process,
)

__all__ = [
    "CONSOLE_VARIABLE",
    "KEPT_VARIABLE",
    "LAUNCHER_VARIABLE",
    "RENDEZVOUS_VARIABLE",
    "HostEnvironment",
    "ProcessEnvironment",
    "cache_directory",
    "carried_variables",
    "child_environment",
    "chosen_threads",
    "console_descriptor",
    "debugging_variables",
    "extensions_directory",
    "gloo_interface",
    "host_environment",
    "host_name",
    "is_kept",
    "launcher_process",
    "launcher_variables",
    "process_environment",
    "processes_per_host",
    "remember_collectives",
    "set_build_environment",
    "teacher_key",
    "visible_devices",
    "without_torch_traces",
]

RENDEZVOUS_VARIABLE = "UNDERSTUDY_RENDEZVOUS"
"""Set by our own local launcher: the `init_method` URL of the process group, a file that needs no port."""

CONSOLE_VARIABLE = "UNDERSTUDY_CONSOLE"
"""Set by our own local launcher for rank 0: the file descriptor of the launcher's own standard output."""

LAUNCHER_VARIABLE = "UNDERSTUDY_LAUNCHER"
"""Set by our own local launcher: its process id."""

KEPT_VARIABLE = "UNDERSTUDY_KEPT"
"""Set by `understudy launch` for what it starts on a host, whose standard input is a `launch.keeper_note`."""

_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MARKS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", RENDEZVOUS_VARIABLE)
"""Set for the processes of torchrun and accelerate, of srun, and of our own launcher; nobody sets them by hand."""

_CARRIED = ("PYTHONPATH", "LD_LIBRARY_PATH", "XDG_CACHE_HOME")
_CARRIED_PREFIXES = (
    *("UNDERSTUDY_", "HF_", "OMP_", "TORCH_", "PYTORCH_", "CUDA_", "ASCEND_"),
    *("NCCL_", "GLOO_", "HCCL_", "FI_", "UCX_"),
)
_OF_ONE_PROCESS = (RENDEZVOUS_VARIABLE, CONSOLE_VARIABLE, LAUNCHER_VARIABLE, KEPT_VARIABLE)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")

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


def cache_directory() -> Path:
    """Where prepared data and materialised weights are kept: UNDERSTUDY_CACHE, else XDG_CACHE_HOME, else ~/.cache."""
    if explicit := os.environ.get("UNDERSTUDY_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "understudy"


def carried_variables(environ: Mapping[str, str] | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """What other hosts of a run must have set as it is here: variables that may be shown, and secrets."""
    env = os.environ if environ is None else environ
    carried = {
        name: value
        for name, value in env.items()
        if (name in _CARRIED or name.startswith(_CARRIED_PREFIXES)) and name not in _OF_ONE_PROCESS
    }
    secrets = {name: value for name, value in carried.items() if _SECRET.search(name)}
    return {name: value for name, value in carried.items() if name not in secrets}, secrets


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


def remember_collectives(number_of_them: int) -> None:
    """PyTorch's flight recorder, which begins with this process's first group, is going to keep so many, unless the
    user chose another number."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(number_of_them))


def extensions_directory() -> Path:
    """Where compiled extensions are; `set_build_environment` came first."""
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])


def chosen_threads() -> int | None:
    """Threads a process, when the user set OMP_NUM_THREADS."""
    return number(os.environ, "OMP_NUM_THREADS") if "OMP_NUM_THREADS" in os.environ else None


def console_descriptor() -> int | None:
    """The file descriptor our local launcher gave this process to reach the user; None outside of it."""
    return number(os.environ, CONSOLE_VARIABLE) if CONSOLE_VARIABLE in os.environ else None


def launcher_process() -> int | None:
    """The process id of our local launcher; None outside of it."""
    return number(os.environ, LAUNCHER_VARIABLE) if LAUNCHER_VARIABLE in os.environ else None


def is_kept() -> bool:
    """Whether `understudy launch` started this launcher."""
    return KEPT_VARIABLE in os.environ and LAUNCHER_VARIABLE not in os.environ


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
    """As `place_of_process`, of this process's environment."""
    return place_of_process(os.environ if environ is None else environ, RENDEZVOUS_VARIABLE)


def host_environment() -> HostEnvironment | None:
    """As `place_of_host`, of this process's environment."""
    return place_of_host(os.environ)


def processes_per_host() -> int | None:
    """As `asked_processes`, of this process's environment."""
    return asked_processes(os.environ)


@contextmanager
def without_torch_traces() -> Iterator[None]:
    """torch that is imported inside, for the first time, prints nothing from its C++ code of what it raises."""
    name = "TORCH_CPP_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "FATAL"
    try:
        yield
    finally:
        del os.environ[name]


def host_name() -> str:
    """What to call this host: as Slurm names it, else as it does itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def gloo_interface() -> str | None:
    """The network interface that the user, or our own launcher, chose for gloo."""
    return os.environ.get("GLOO_SOCKET_IFNAME")


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
