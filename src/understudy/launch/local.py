"""Starts a run's processes on this host. Imports no torch."""

from __future__ import annotations

import tempfile
from pathlib import Path

from understudy.launch.launcher import Cluster, NodeCommand, RunSpec
from understudy.launch.processes import run_processes
from understudy.launch.run_directory import RunDirectory
from understudy.recipe.environment import RENDEZVOUS_VARIABLE, chosen_threads

__all__ = ["LocalLauncher", "launch_local"]


class LocalLauncher:
    """One process a device, all on this host, that find each other through a file: no port is opened or guessed."""

    def commands(self, run: RunSpec, cluster: Cluster) -> list[NodeCommand]:
        return [
            NodeCommand(rank, run.arguments, self._environment(rank, run, cluster)) for rank in range(run.processes)
        ]

    def _environment(self, rank: int, run: RunSpec, cluster: Cluster) -> dict[str, str]:
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(run.processes),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(run.processes),
            RENDEZVOUS_VARIABLE: f"file://{cluster.rendezvous}",
            "PYTHONUNBUFFERED": "1",
        }
        if cluster.threads is None:
            # Without it each process starts a thread a core, and processes × cores threads fight for the cores.
            environment["OMP_NUM_THREADS"] = str(max(1, cluster.cores // run.processes))
        if not cluster.accelerated:
            # gloo asks the resolver for this host's address otherwise, which fails where the name is not known.
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        return environment


def launch_local(
    arguments: tuple[str, ...],
    processes: int,
    directory: RunDirectory,
    cores: int,
    *,
    accelerated: bool,
    console: bool = True,
) -> None:
    """Runs `arguments` in `processes` processes on this host until all have ended well.

    Rank 0 speaks to our stdout unless `console` is false.

    Raises the failure that came first: `FailedRunError` with the failing process's exit status, `LostProcessError` when
    a process vanished; `StoppedError` when the run was stopped on request, and `FailedRunError` with status 1 when it
    was asked twice, and so killed. No process is left behind.
    """
    with tempfile.TemporaryDirectory(prefix="understudy-") as private:
        cluster = Cluster(cores, accelerated, Path(private) / "rendezvous", chosen_threads())
        run_processes(LocalLauncher().commands(RunSpec(arguments, processes), cluster), directory, console=console)
