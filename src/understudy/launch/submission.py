"""A job for somebody else's scheduler, described once for all of them. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from understudy.errors import UserError

__all__ = ["Submission"]

_PLAIN = re.compile(r"[\w.,:+=@/\[\]*&|()-]+", re.ASCII)

_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", re.ASCII)


@dataclass(frozen=True)
class Submission:
    """What is to be run, and where. Raises `UserError` for what a scheduler could misread."""

    name: str
    recipe: str
    """Absolute,"""
    directory: str
    """and where relative paths of the recipe begin."""
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    min_nodes: int | None = None
    gpus_per_node: int | None = None
    max_restarts: int = 0
    environment: str = "venv:"
    """venv:DIRECTORY of programs, conda:NAME or container:IMAGE."""
    variables: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str | None] = field(default_factory=dict)
    """Of the scheduler, by name; None for one that takes no value."""
    log_directory: str | None = None
    signal_seconds: int = 120
    """How long before the time limit to ask for a checkpoint."""
    image: str | None = None
    accelerator: str | None = None
    volumes: tuple[tuple[str, str], ...] = ()
    """Of Kubernetes: each a persistent volume claim, and the path where it is mounted."""

    def __post_init__(self) -> None:
        for name, value in {"job-name": self.name, **self.options}.items():
            if value is not None and not _PLAIN.fullmatch(value):
                raise UserError(f"--{name} {value!r} has characters that the batch system could misread; change it.")
        if (text := self.log_directory) is not None and (not text.isprintable() or set(text) & set('"\\%')):
            raise UserError(f"--log-dir {text!r} has characters that Slurm would take for its own; choose another.")
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise UserError(f"--min-nodes {self.min_nodes} is more than --nodes {self.nodes}; make it at most that.")
        for claim, path in self.volumes:
            if not _CLAIM.fullmatch(claim) or not path.startswith("/") or ":" in path:
                raise UserError(f"--volume {claim}:{path} is not CLAIM:/PATH, with the name of a claim of Kubernetes.")
        for text in (self.recipe, self.directory, *self.overrides):
            if "\0" in text:
                raise UserError(f"{text!r} has a NUL character, which no command line can carry.")

    @property
    def command(self) -> tuple[str, ...]:
        """What trains, without the program."""
        return ("train", self.recipe, *self.overrides)
