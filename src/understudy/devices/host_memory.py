"""Memory of this host, and how much of it this process may have. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_memory_bytes", "group_files", "host_memory_bytes", "memory_limit_bytes", "usable_memory_bytes"]

_UNLIMITED_BYTES = 2**60
"""Version 1 of control groups says a number near 2⁶³ where there is no limit."""


def host_memory_bytes(root: Path = Path("/")) -> int:
    """All that the host has; `root` is the file system's root."""
    if (known := _meminfo(root, "MemTotal")) is not None:
        return known
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_memory_bytes(root: Path = Path("/")) -> int:
    """The host's memory, or less where a control group limits it."""
    total, limit = host_memory_bytes(root), memory_limit_bytes(root)
    return total if limit is None else min(total, limit)


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """What could be had now without swapping, by the kernel's estimate; None where it gives none."""
    return _meminfo(root, "MemAvailable")


def memory_limit_bytes(root: Path = Path("/")) -> int | None:
    """The lowest limit of the control groups that this process is in (a container's, a batch system's); None without
    one."""
    limits = [
        int(text)
        for file in (*group_files(root, "", "memory.max"), *group_files(root, "memory", "memory.limit_in_bytes"))
        if (text := _read(file)).isdigit()
    ]
    return min((limit for limit in limits if limit < _UNLIMITED_BYTES), default=None)


def group_files(root: Path, controller: str, name: str) -> Iterator[Path]:
    """The files called `name` of the control groups that this process is in, from the innermost to the outermost one.

    `controller` is one of version 1, empty for version 2. In a container the groups above its own are not seen.
    """
    top = root / "sys/fs/cgroup" / controller
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            inside = Path(path.lstrip("/"))
            for group in (inside, *inside.parents):
                if group != Path():
                    yield top / group / name
    yield top / name


def _meminfo(root: Path, name: str) -> int | None:
    found = re.search(rf"{name}:\s+(\d+) kB", _read(root / "proc/meminfo"))
    return int(found[1]) * 1024 if found else None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
