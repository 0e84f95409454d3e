"""Memory of the host: how much a run may have, and how much of it processes can share."""

from __future__ import annotations

import shutil

from understudy.devices.host_memory import available_memory_bytes, host_memory_bytes, memory_limit_bytes
from understudy.diagnosis.check import Finding, Host, broken, check, ok, warning
from understudy.diagnosis.sizes import GIB, MIB, shown

LEAST_BYTES, LITTLE_BYTES = GIB // 2, 4 * GIB
"""torch and a tiny model take the first; a small model in two processes the second."""
LEAST_SHARED_BYTES, LITTLE_SHARED_BYTES = 8 * MIB, GIB
"""Semaphores take nearly nothing; NCCL and DeepSpeed's collectives of a host tens of megabytes a process."""


@check("host-memory")
def host_memory(host: Host) -> Finding:
    total, limit = host_memory_bytes(host.root), memory_limit_bytes(host.root)
    limited = limit is not None and limit < total
    free = available_memory_bytes(host.root)
    free = total if free is None else free
    may_have = min(free, limit) if limit is not None else free
    details = {"total_bytes": total, "limit_bytes": limit, "available_bytes": free}
    found = f"{shown(total)}, of which {shown(free)} are free"
    fix = "End what else uses memory, or take a bigger machine."
    if limited:
        assert limit is not None
        found += f"; the control group of this process (a container's or a batch job's) may have {shown(limit)}"
        if limit < LITTLE_BYTES:
            fix = "Give the container or the batch job more memory."
    if may_have < LEAST_BYTES:
        return broken(f"{found}; that is too little for any run", fix, **details)
    if may_have < LITTLE_BYTES:
        return warning(f"{found}; only tiny models train in that", fix, **details)
    return ok(found, **details)


@check("shared-memory")
def shared_memory(host: Host) -> Finding:
    """Of what processes share: semaphores of those that tokenise, and buffers of collectives inside a host."""
    place = host.root / "dev/shm"
    fix = "In a container, start it with `--shm-size=8g` or `--ipc=host`; else have an administrator enlarge /dev/shm."
    try:
        usage = shutil.disk_usage(place)
    except OSError as error:
        return broken(f"/dev/shm cannot be used ({error.strerror}), and processes cannot share memory without it", fix)
    details = {"total_bytes": usage.total, "free_bytes": usage.free}
    found = f"{shown(usage.free)} free of {shown(usage.total)} in /dev/shm"
    if usage.free < LEAST_SHARED_BYTES:
        return broken(f"only {found}", f"Remove what is left over there. {fix}", **details)
    if usage.free < LITTLE_SHARED_BYTES:
        return warning(f"only {found}, which collectives of several devices fill", fix, **details)
    return ok(found, **details)
