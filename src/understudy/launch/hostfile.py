"""Files that list the hosts of a run, as DeepSpeed and MPI have them: `host slots=N` on each line. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from understudy.errors import UserError
from understudy.recipe.schema import Cluster
from understudy.recipe.source_map import SourceMap
from understudy.recipe.text_file import read_text

__all__ = ["ListedHost", "read_hostfile", "require_enough"]

# Nothing that a shell or ssh could take for more than a name.
_TARGET = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.-]*")
_EXAMPLE = "a line is a host and how many processes it gets, such as `node1 slots=8`"


@dataclass(frozen=True)
class ListedHost:
    """One line of a hostfile."""

    target: str
    """As ssh takes it: `host` or `user@host`."""
    slots: int | None
    """Processes to start there; None for as many as it has devices."""

    @property
    def name(self) -> str:
        """By which the other hosts find it, too."""
        return self.target.rpartition("@")[2]


def read_hostfile(path: Path) -> tuple[ListedHost, ...]:
    """The hosts in the order of their lines; `#` begins a comment. Raises `UserError` with the line."""
    found: dict[str, ListedHost] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(read_text(path, "hostfile").splitlines(), 1):
        if not (words := line.partition("#")[0].split()):
            continue
        host = _host(words, path, number)
        if (earlier := lines.setdefault(host.name.lower(), number)) != number:
            raise UserError(
                f"{host.name} is on line {earlier} too; give each host one line, with all of its slots.",
                file=path,
                line=number,
            )
        found[host.name.lower()] = host
    if not found:
        raise UserError(f"it lists no host; {_EXAMPLE}.", file=path)
    return tuple(found.values())


def require_enough(hosts: Sequence[ListedHost], path: Path, cluster: Cluster, sources: SourceMap) -> None:
    """Raises `UserError` at the recipe's key where `hosts`, listed in `path`, are not what a recipe asks for."""
    if cluster.nodes not in (1, len(hosts)):
        raise sources.error(
            "cluster.nodes", f"{cluster.nodes} hosts, but {path} lists {len(hosts)}; make them the same."
        )
    if cluster.min_nodes is not None and cluster.min_nodes > len(hosts):
        raise sources.error(
            "cluster.min_nodes", f"{cluster.min_nodes} hosts at least, but {path} lists {len(hosts)}; list more."
        )
    for host in hosts:
        if cluster.processes not in ("auto", host.slots) and host.slots is not None:
            raise sources.error(
                "cluster.processes",
                f"{cluster.processes} processes a host, but {path} has slots={host.slots} for {host.name}; leave one "
                "of the two out.",
            )


def _host(words: list[str], path: Path, number: int) -> ListedHost:
    target, *settings = words
    if _TARGET.fullmatch(target) is None:
        raise UserError(f"{target!r} is no host's name or IPv4 address; {_EXAMPLE}.", file=path, line=number)
    slots = None
    for setting in settings:
        name, _, value = setting.partition("=")
        if name != "slots" or slots is not None:
            raise UserError(f"{setting!r} is not understood; {_EXAMPLE}.", file=path, line=number)
        if not value.isascii() or not value.isdigit() or int(value) == 0:
            raise UserError(
                f"slots={value}; slots is a number, 1 or more. To leave {target} out, put # before it.",
                file=path,
                line=number,
            )
        slots = int(value)
    return ListedHost(target, slots)
