"""Files that last through a power cut once they are written."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["sync_directory", "sync_tree", "write_durably"]


def write_durably(path: Path, content: bytes) -> None:
    """Writes `path` and waits until the disk has it. Its directory entry lasts once the directory is synced."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Waits until the disk has the entries of `directory`."""
    _sync(directory)


def sync_tree(directory: Path) -> None:
    """Waits until the disk has every file under `directory`, and every directory."""
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
