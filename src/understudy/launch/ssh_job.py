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
            ours = host_facts(str(launcher.directory), recipe, hosts[0].name, str(launcher.port))
            check_hosts(launcher, hosts, recipe, ours)
        least = cluster.min_nodes or len(hosts)
        left, restarts, changes = tuple(hosts), 0, list[str]()

        def enough(count: int) -> bool:
            return restarts < cluster.max_restarts and count >= least

        while True:
            commands = launcher.run(left, ["train", recipe, *arguments, *changes])
            try:
                run_on_hosts(left, commands, secrets, requests, going_on=enough)
                return
            except LostHostsError as error:
                restarts += error.restarts
                if not enough(len(error.left)) or requests.received:
                    raise
                restarts, left = restarts + 1, error.left
                arguments = [argument for argument in arguments if argument != "--overwrite"]
                # The hosts count on from here, and are fewer.
                changes = [f"cluster.max_restarts={cluster.max_restarts - restarts}"]
                if cluster.nodes > 1:
                    changes.append(f"cluster.nodes={len(left)}")
                say(
                    f"{error} Starting again on {', '.join(host.name for host in left)} (restart {restarts} of "
                    f"{cluster.max_restarts})."
                )
