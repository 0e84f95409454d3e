"""What a disk can be left with: every change under a directory is traced, and each is a moment to crash at.

A crash keeps what was synced, and of the rest anything between nothing and everything. Four cases stand for all: one
that ends the process only, and three power cuts, each of which loses what another one keeps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR
from threading import RLock
from typing import Any, NamedTuple
from unittest.mock import patch

__all__ = ["CrashState", "CrashTracer", "tracing"]

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NAMED_DEPTH = 2
"""Directories so far below the root are named last, when they are whole: `checkpoints/step-…`."""


@dataclass(frozen=True)
class CrashState:
    """What is left by a crash right before `operation`, when the caller had come as far as `stage`."""

    case: str
    operation: str
    stage: Any
    tree: Mapping[str, bytes | None]
    """Content by path in the root, with slashes; None for a directory."""

    def write(self, directory: Path) -> None:
        directory.mkdir()
        for name, content in self.tree.items():
            if content is None:
                (directory / name).mkdir()
            else:
                (directory / name).write_bytes(content)

    def __str__(self) -> str:
        return f"{self.case} before {self.operation}"


@dataclass
class _Node:
    """A file or a directory, whatever its names are."""

    descriptor: int
    """Held open, so that its number goes to no other file."""
    is_directory: bool
    synced_content: bytes = b""
    synced_entries: dict[str, _Node] = field(default_factory=dict)

    def content(self) -> bytes:
        return os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)


class _Case(NamedTuple):
    name: str
    entries: Callable[[_Node, int], Mapping[str, _Node]]
    """Of a directory so far below the root."""
    content: Callable[[str, _Node], bytes]


class CrashTracer:
    """Collects the distinct states that a crash can leave of `root`. What is there at the start lasts already."""

    def __init__(self, root: Path, *, vouching: str) -> None:
        """A file called `vouching` says of its directory that all of it is there."""
        self.stage: Any = None
        """For the caller to note how far it has come."""
        self.states: list[CrashState] = []
        self._vouching = vouching
        self._nodes: dict[int, _Node] = {}
        self._seen: set[tuple[Any, ...]] = set()
        self._lock = RLock()
        self._busy = False
        self._root = self._node(str(root), None)
        for node in self._below(self._root):
            self._make_last(node)
        self._cases = (
            _Case("killed", self._live, lambda name, node: node.content()),
            _Case("power cut, nothing unsynced left,", lambda node, depth: node.synced_entries, _synced),
            _Case("power cut, names left without content,", self._live, _synced),
            _Case("power cut, only what vouches left,", self._vouching_entries, self._vouching_content),
        )

    def close(self) -> None:
        for node in self._nodes.values():
            os.close(node.descriptor)

    def note(self, operation: str) -> None:
        """A moment to crash at."""
        with self._lock:
            if self._busy:  # our own reading
                return
            self._busy = True
            for case in self._cases:
                tree: dict[str, bytes | None] = {}
                self._lay_out(self._root, "", 0, case, tree)
                key = (self.stage, *tree.items())
                if key not in self._seen:
                    self._seen.add(key)
                    self.states.append(CrashState(case.name, operation, self.stage, tree))
            self._busy = False

    def synced(self, descriptor: int) -> None:
        """What `descriptor` is open at lasts from now on."""
        with self._lock:
            self._busy = True
            self._below(self._root)
            node = self._nodes.get(os.fstat(descriptor).st_ino)
            if node is not None:
                self._make_last(node)
            self._busy = False

    def _make_last(self, node: _Node) -> None:
        if node.is_directory:
            node.synced_entries = self._live(node)
        else:
            node.synced_content = node.content()

    def _lay_out(self, node: _Node, at: str, depth: int, case: _Case, tree: dict[str, bytes | None]) -> None:
        for name, child in sorted(case.entries(node, depth).items()):
            if child.is_directory:
                tree[at + name] = None
                self._lay_out(child, f"{at}{name}/", depth + 1, case, tree)
            else:
                tree[at + name] = case.content(name, child)

    def _live(self, node: _Node, depth: int = 0) -> dict[str, _Node]:
        with os.scandir(node.descriptor) as entries:
            return {entry.name: self._node(entry.name, node.descriptor) for entry in entries}

    def _vouching_entries(self, node: _Node, depth: int) -> dict[str, _Node]:
        live = self._live(node)
        if depth < NAMED_DEPTH:
            return live
        return {**node.synced_entries, **{name: child for name, child in live.items() if name == self._vouching}}

    def _vouching_content(self, name: str, node: _Node) -> bytes:
        return node.content() if name == self._vouching else node.synced_content

    def _below(self, node: _Node) -> list[_Node]:
        nodes = [node]
        if node.is_directory:
            for child in self._live(node).values():
                nodes += self._below(child)
        return nodes

    def _node(self, name: str, directory: int | None) -> _Node:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
        status = os.fstat(descriptor)
        if status.st_ino in self._nodes:
            os.close(descriptor)
        else:
            self._nodes[status.st_ino] = _Node(descriptor, S_ISDIR(status.st_mode))
        return self._nodes[status.st_ino]


def _synced(name: str, node: _Node) -> bytes:
    return node.synced_content


_active: list[CrashTracer] = []
_hooked: list[bool] = []


@contextmanager
def tracing(root: Path, *, vouching: str) -> Iterator[CrashTracer]:
    """Traces what this process changes under `root`, one thread at a time."""
    tracer = CrashTracer(root, vouching=vouching)
    fsync = os.fsync

    def traced_fsync(descriptor: int) -> None:
        tracer.note("an fsync")
        fsync(descriptor)
        tracer.synced(descriptor)

    if not _hooked:  # Python has no way to take a hook away
        sys.addaudithook(_note_event)
        _hooked.append(True)
    _active.append(tracer)
    try:
        with patch.object(os, "fsync", traced_fsync):
            yield tracer
        tracer.note("the next save")
    finally:
        _active.remove(tracer)
        tracer.close()


def _note_event(event: str, arguments: tuple[Any, ...]) -> None:
    if not _active or (event not in CHANGES and not (event == "open" and arguments[2] & FOR_WRITING)):
        return
    name = str(arguments[0]).rpartition("/")[2]
    for tracer in _active:
        tracer.note(f"{event.removeprefix('os.')} {name}")
