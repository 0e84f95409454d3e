"""`understudy launch`: a run over hosts that ssh reaches, checked, started, and started again without the first host
where that one is lost. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from understudy.launch.hostfile import ListedHost
from understudy.launch.signals import noted_signals
from understudy.launch.ssh import SshLauncher
from understudy.launch.ssh_check import check_hosts
from understudy.launch.ssh_facts import host_facts
from understudy.launch.ssh_run import LostHostsError, run_on_hosts
from understudy.recipe.schema import Cluster

__all__ = ["launch_over_ssh"]


def launch_over_ssh(
    launcher: SshLauncher,
    hosts: Sequence[ListedHost],
    recipe: str,
    arguments: Sequence[str],
    cluster: Cluster,
    secrets: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Runs `understudy train RECIPE ARGUMENTS…` on all of `hosts` together.

    The hosts restart what fails among them; the first of them, which leads, they cannot do without. Where it is lost
    and `cluster` allows restarts with the others, they are started again here, the next one leading.
    """
    with noted_signals() as requests:
        with requests.interruptible():
            check_hosts(launcher, hosts, recipe, host_facts(str(launcher.directory), recipe, hosts[0].name))
        least = cluster.min_nodes or len(hosts)
        left, restarts = tuple(hosts), 0
        while True:
            commands = launcher.run(left, ["train", recipe, *arguments])
            try:
                run_on_hosts(
                    left,
                    commands,
                    secrets,
                    requests,
                    going_on=lambda count: cluster.max_restarts > 0 and count >= least,
                )
                return
            except LostHostsError as error:
                if restarts == cluster.max_restarts or len(error.left) < least or requests.received:
                    raise
                restarts, left = restarts + 1, error.left
                arguments = [argument for argument in arguments if argument != "--overwrite"]
                say(
                    f"{error} Starting again on {', '.join(host.name for host in left)} ({restarts} of "
                    f"{cluster.max_restarts} restarts)."
                )
