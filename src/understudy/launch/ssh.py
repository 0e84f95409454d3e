"""The command lines by which `understudy launch` starts a host's part of a run over ssh. Pure; imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from understudy.launch.hostfile import ListedHost

__all__ = ["SshLauncher"]

OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "4",
    "ServerAliveCountMax": "3",
    "LogLevel": "ERROR",
}
"""A question would wait for an answer that nobody sees; a connection that is dead is found so within 12 s."""


@dataclass(frozen=True)
class SshLauncher:
    """Starts the same program, by the same Python, in the same directory on every host."""

    python: str
    directory: Path
    port: int
    """Where the hosts meet, on the first one."""
    options: tuple[str, ...]
    """`-o` options of ssh, which go before ours."""
    variables: Mapping[str, str]
    """To set on every host."""

    def check(self, host: ListedHost, recipe: str, first: ListedHost) -> list[str]:
        """Has `host` tell what must be the same on all."""
        return self._on(
            host, {}, ["understudy.launch.ssh_facts", str(self.directory), recipe, first.name, str(self.port)]
        )

    def run(self, hosts: Sequence[ListedHost], arguments: Sequence[str]) -> list[list[str]]:
        """Has each of `hosts`, in order, run its part of `understudy ARGUMENTS…`."""
        return [self._run(hosts, node, arguments) for node in range(len(hosts))]

    def _run(self, hosts: Sequence[ListedHost], node: int, arguments: Sequence[str]) -> list[str]:
        place = {
            "NNODES": str(len(hosts)),
            "NODE_RANK": str(node),
            "MASTER_ADDR": hosts[0].name,
            "MASTER_PORT": str(self.port),
        }
        if (slots := hosts[node].slots) is not None:
            place["NPROC_PER_NODE"] = str(slots)
        return self._on(hosts[node], place, ["understudy.launch.ssh_keeper", str(self.directory), *arguments])

    def _on(self, host: ListedHost, variables: Mapping[str, str], module: Sequence[str]) -> list[str]:
        assignments = [f"{name}={value}" for name, value in {**self.variables, **variables}.items()]
        # A shell of any kind reads it at the other end.
        remote = shlex.join(["exec", "env", *assignments, self.python, "-m", *module])
        options = [*self.options, *(f"{name}={value}" for name, value in OPTIONS.items())]
        return ["ssh", "-T", *(word for option in options for word in ("-o", option)), "--", host.target, remote]
