"""What every launcher is: a pure function from a run and a cluster to commands. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["Cluster", "Launcher", "NodeCommand", "RunSpec", "Share"]


@dataclass(frozen=True)
class RunSpec:
    """What is to be run."""

    arguments: tuple[str, ...]
    """Command line of each process."""
    processes: int
    """On this host,"""
    first_rank: int
    """of which the first has this rank"""
    world_size: int
    """of so many on all hosts."""


@dataclass(frozen=True)
class Share:
    """This host's part of a run on several."""

    first_rank: int
    world_size: int
    address: str
    """Of the first host, and"""
    port: int
    """that of the store its launcher keeps there."""
    attempt: int
    """How often the run was started before."""


@dataclass(frozen=True)
class Cluster:
    """Where it is to be run."""

    cores: int
    """Processor cores of a host that the run may use."""
    accelerated: bool
    """The hosts have accelerators; without them, collectives run over gloo."""
    rendezvous: Path
    """A path that does not exist yet, on a disk all processes see, where they find each other."""
    threads: int | None
    """Threads a process, when the user chose them."""
    share: Share | None = None
    """Where other hosts take part."""


@dataclass(frozen=True)
class NodeCommand:
    """One process to start."""

    rank: int
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    """Variables to add to those the launcher has."""


class Launcher(Protocol):
    def commands(self, run: RunSpec, cluster: Cluster) -> list[NodeCommand]:
        """Every process of `run`, in the order of ranks. Pure: nothing is started, read or written."""
        ...
