"""A job for somebody else's scheduler, described once for all of them. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from understudy.errors import UserError

__all__ = ["Submission"]

_PLAIN = re.compile(r"[\w.,:+=@/\[\]*&|()-]", re.ASCII)
_PLAIN_IN_WORDS = "letters a to z and A to Z, digits, and _ . , : + = @ / [ ] * & | ( ) -"

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
            if value == "":
                raise UserError(f"--{name} is empty; write something, or leave it out.")
            if wrong := [char for char in value or "" if not _PLAIN.match(char)]:
                raise UserError(
                    f"--{name} has {_in_words(wrong)}, which the batch system could misread; write it with "
                    f"{_PLAIN_IN_WORDS}."
                )
        if wrong := [char for char in self.log_directory or "" if not char.isprintable() or char in '"\\%']:
            raise UserError(f"--log-dir has {_in_words(wrong)}, which Slurm would take for its own; choose another.")
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


def _in_words(characters: Sequence[str]) -> str:
    """On one line."""
    names = {" ": "a space", "\n": "a line break", "\t": "a tab"}
    shown = [names.get(char, char if char.isprintable() else f"U+{ord(char):04X}") for char in characters]
    return " and ".join(dict.fromkeys(shown))
