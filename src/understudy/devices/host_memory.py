"""Memory of this host, and how much of it this process may have. Imports no torch."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

from understudy.launch.control_groups import group_files

__all__ = [
    "available_memory_bytes",
    "held_data_bytes",
    "host_memory_bytes",
    "lift_data_limit",
    "limit_data",
    "memory_limit_bytes",
    "usable_memory_bytes",
]

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


def held_data_bytes(root: Path = Path("/")) -> int | None:
    """Private memory that this process has written to; None where the system does not tell."""
    return _status(root, "RssAnon")


def limit_data(size_bytes: int) -> None:
    """From now on this process gets no more than `size_bytes` of private memory that it may write to.

    That is what `held_data_bytes` says, and everything that the process reserves from now on, in Python, C++ or
    threads, whether it touches it or not: objects, tensors, stacks. What is reserved already and not touched is left
    out (an allocator of Arrow's reserves a gibibyte), and so are programs' text, files mapped to be read, and memory
    that processes share. What asks for more gets `MemoryError`, `RuntimeError` or `OSError`, or aborts. Processes that
    it starts inherit the limit. Linux counts so since 4.7 (getrlimit(2), RLIMIT_DATA).
    """
    reserved, held = _status(Path("/"), "VmData"), held_data_bytes()
    untouched_bytes = max(0, reserved - held) if reserved is not None and held is not None else 0
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_DATA, (min(size_bytes + untouched_bytes, most), hard))


def lift_data_limit() -> None:
    """Undoes `limit_data`, for a process that is about to end and has to say why."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _meminfo(root: Path, name: str) -> int | None:
    found = re.search(rf"{name}:\s+(\d+) kB", _read(root / "proc/meminfo"))
    return int(found[1]) * 1024 if found else None


def _status(root: Path, name: str) -> int | None:
    """Of this process, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", _read(root / "proc/self/status"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
