"""What the system lets a process have: open files, locked memory, processes and threads."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from understudy.diagnosis.check import Finding, Host, broken, check, ok, warning
from understudy.diagnosis.sizes import shown
from understudy.launch.control_groups import group_files

FEWEST_FILES, FEW_FILES = 256, 1024
"""A process of a run holds weights, data, logs and connections to its peers open; the usual limit is the second."""
FEWEST_THREADS, FEW_THREADS = 64, 1024
"""Each process of a run has some threads a core, and some for each connection."""


@check("open-files")
def open_files(host: Host) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"a process may open {_shown(soft)} files"
    raised = FEW_FILES * 4
    if hard == resource.RLIM_INFINITY or hard >= raised:
        fix = f"Run `ulimit -n {raised}` in the shell before you train."
    else:
        fix = f"Have an administrator raise the limit `nofile` to {raised}; in a container, `--ulimit nofile={raised}`."
    if _below(soft, FEWEST_FILES):
        return broken(f"{found}, too few to train", fix, limit=soft)
    if _below(soft, FEW_FILES):
        return warning(f"{found}, which may not be enough for much data or many processes", fix, limit=soft)
    return ok(found, limit=soft)


@check("locked-memory")
def locked_memory(host: Host) -> Finding:
    """Network cards that reach into memory themselves need it; nothing else does."""
    if sys.platform != "linux":
        return ok("this system has no such limit")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "without limit" if soft == resource.RLIM_INFINITY else f"up to {shown(soft)}"
    cards = sorted(path.name for path in (host.root / "sys/class/infiniband").glob("*"))
    if cards and soft != resource.RLIM_INFINITY:
        return warning(
            f"a process may lock {limit} of memory, and {', '.join(cards)} cannot be used with that",
            "Run `ulimit -l unlimited`, or have an administrator raise the limit `memlock`; in a container, "
            "`--ulimit memlock=-1`. Without it hosts talk over plain sockets.",
            limit=soft,
        )
    return ok(f"a process may lock memory {limit}" + ("" if cards else "; nothing here needs more"), limit=soft)


@check("process-limit")
def process_limit(host: Host) -> Finding:
    """How many more processes and threads there may be."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    room, whose = (None, "") if soft == resource.RLIM_INFINITY else (soft, "the user's limit `nproc`")
    for file in (*group_files(host.root, "", "pids.max"), *group_files(host.root, "pids", "pids.max")):
        most, now = (_number(file.with_name(name)) for name in ("pids.max", "pids.current"))
        if most is not None and (room is None or most - (now or 0) < room):
            room, whose = most - (now or 0), f"the limit of the control group {file.parent}"
    if room is None:
        return ok("processes and threads without limit")
    found = f"{room:,} more processes and threads by {whose}"
    fix = f"Raise {whose}; in a container, `--pids-limit=-1`."
    if room < FEWEST_THREADS:
        return broken(f"only {found}", fix, room=room)
    if room < FEW_THREADS:
        return warning(f"only {found}; many processes on many cores need more", fix, room=room)
    return ok(found, room=room)


def _shown(limit: int) -> str:
    return "any number of" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def _below(limit: int, least: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < least


def _number(file: Path) -> int | None:
    """None where it says `max`, or is not there."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
