"""Starts a run's processes on this host. Imports no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from understudy.launch.launcher import Cluster, NodeCommand, RunSpec, Share
from understudy.launch.processes import Watcher, run_processes
from understudy.launch.run_directory import RunDirectory
from understudy.recipe.environment import RENDEZVOUS_VARIABLE, chosen_threads

__all__ = ["LocalLauncher", "launch_local"]


class LocalLauncher:
    """One process a device, on this host. Where it is the only one they find each other through a file: no port is
    opened or guessed."""

    def commands(self, run: RunSpec, cluster: Cluster) -> list[NodeCommand]:
        return [
            NodeCommand(run.first_rank + local, run.arguments, self._environment(local, run, cluster))
            for local in range(run.processes)
        ]

    def _environment(self, local: int, run: RunSpec, cluster: Cluster) -> dict[str, str]:
        environment = {
            "RANK": str(run.first_rank + local),
            "WORLD_SIZE": str(run.world_size),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(run.processes),
            "PYTHONUNBUFFERED": "1",
        }
        if cluster.share is None:
            environment[RENDEZVOUS_VARIABLE] = f"file://{cluster.rendezvous}"
        else:
            share = cluster.share
            # The launcher on the first host keeps the store, and each start has names of its own in it.
            environment[RENDEZVOUS_VARIABLE] = f"store://{share.address}:{share.port}/{share.attempt}"
            environment |= {"MASTER_ADDR": share.address, "MASTER_PORT": str(share.port)}
        if cluster.threads is None:
            # Without it each process starts a thread a core, and processes × cores threads fight for the cores.
            environment["OMP_NUM_THREADS"] = str(max(1, cluster.cores // run.processes))
        if not cluster.accelerated and cluster.share is None:
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
    share: Share | None = None,
    watchers: Sequence[Watcher] = (),
) -> None:
    """Runs `arguments` in `processes` processes on this host until all have ended well; they are all of the run's, or
    this host's `share` of them.

    Rank 0 speaks to our stdout unless `console` is false.

    Raises the failure that came first: `FailedRunError` with the failing process's exit status, `LostProcessError` when
    a process vanished; `StoppedError` when the run was stopped on request, and `FailedRunError` with status 1 when it
    was asked twice, and so killed; what one of `watchers` finds. No process is left behind.
    """
    with tempfile.TemporaryDirectory(prefix="understudy-") as private:
        cluster = Cluster(cores, accelerated, Path(private) / "rendezvous", chosen_threads(), share)
        first, size = (0, processes) if share is None else (share.first_rank, share.world_size)
        commands = LocalLauncher().commands(RunSpec(arguments, processes, first, size), cluster)
        run_processes(commands, directory, console=console, watchers=watchers)
