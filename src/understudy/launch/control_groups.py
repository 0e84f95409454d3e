"""The control groups of Linux that this process is in, which limit what it and its children take. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["group_files", "oom_kills"]


def group_files(root: Path, controller: str, name: str) -> Iterator[Path]:
    """The files called `name` of the control groups that this process is in, from the innermost to the outermost one.

    `controller` is one of version 1, empty for version 2. In a container the groups above its own are not seen. `root`
    is the file system's root.
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


def oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes the kernel has killed because they, their control groups or the host had no memory left: of
    the innermost group that counts them, else of the host. None where nothing counts."""
    counters = (*group_files(root, "", "memory.events"), *group_files(root, "memory", "memory.oom_control"))
    for file in (*counters, root / "proc/vmstat"):
        if found := re.search(r"^oom_kill (\d+)$", _read(file), re.MULTILINE):
            return int(found[1])
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
