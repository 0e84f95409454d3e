"""What this machine has, found without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from understudy.devices.host_memory import usable_memory_bytes
from understudy.plan.machine import Machine
from understudy.recipe.environment import visible_devices

__all__ = ["accelerator_name", "detect_machine", "hidden_devices"]

_GPU_LIST, _NPU_LIST = "CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"
_MEBIBYTE = 2**20
_QUERY_SECONDS = 20
"""A driver that answers later than this is as good as none."""


def detect_machine(root: Path = Path("/")) -> Machine:
    """Accelerators, memory and cores that this process may use; `root` is the file system's root.

    Accelerators are counted from the kernel's own files, less those that CUDA_VISIBLE_DEVICES or
    ASCEND_RT_VISIBLE_DEVICES hides; their memory is what the vendor's tool says, 0 where there is none to ask.
    """
    if devices := _visible(_gpus(root), visible_devices(_GPU_LIST)):
        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        return Machine(devices, _smallest_mebibytes(command, r"^\s*(\d+)"), _cores(root))
    if devices := _visible(_npus(root), visible_devices(_NPU_LIST)):
        command = ["npu-smi", "info", "-t", "memory", "-i", "0"]
        return Machine(devices, _smallest_mebibytes(command, r"(?:HBM|DDR) Capacity\(MB\)\s*:\s*(\d+)"), _cores(root))
    return Machine(0, usable_memory_bytes(root), _cores(root))


def accelerator_name(root: Path = Path("/")) -> str:
    """What the vendor's tool calls the first accelerator of this machine; empty where there is none, or none to ask."""
    if _gpus(root):
        return _answer(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).partition("\n")[0].strip()
    found = re.search(r"\b(910\w*)", _answer(["npu-smi", "info"])) if _npus(root) else None
    return found[1] if found else ""


def hidden_devices(root: Path = Path("/")) -> dict[str, int]:
    """How many accelerators each of the environment variables hides that hide any."""
    present = {_GPU_LIST: _gpus(root), _NPU_LIST: _npus(root)}
    hidden = {name: count - _visible(count, visible_devices(name)) for name, count in present.items()}
    return {name: count for name, count in hidden.items() if count}


def _gpus(root: Path) -> int:
    return len(list((root / "proc/driver/nvidia/gpus").glob("*"))) or _numbered(root / "dev", "nvidia")


def _npus(root: Path) -> int:
    return _numbered(root / "dev", "davinci")


def _numbered(directory: Path, prefix: str) -> int:
    return sum(1 for path in directory.glob(f"{prefix}*") if re.fullmatch(rf"{prefix}\d+", path.name))


def _visible(present: int, listed: str | None) -> int:
    """How many of `present` devices a visibility list leaves: those before its first entry that names none."""
    if listed is None:
        return present
    count = 0
    for entry in (part.strip() for part in listed.split(",")):
        # An entry that is no number is a device's UUID.
        if not entry or entry.startswith("-") or (entry.isdigit() and int(entry) >= present):
            break
        count += 1
    return min(count, present)


def _smallest_mebibytes(command: list[str], pattern: str) -> int:
    """Bytes of the smallest device in the output of a vendor's tool; 0 when it is missing or fails."""
    sizes = [int(size) for size in re.findall(pattern, _answer(command), flags=re.MULTILINE)]
    return min(sizes, default=0) * _MEBIBYTE


def _answer(command: list[str]) -> str:
    """What a vendor's tool prints; nothing when it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True)
    except (subprocess.SubprocessError, OSError):
        return ""
    return done.stdout


def _cores(root: Path) -> int:
    """Cores this process may run on, less what its control group's quota (version 2 or 1) takes away."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    groups = root / "sys/fs/cgroup"
    quota, _, period = _read(groups / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(groups / "cpu/cpu.cfs_quota_us"), _read(groups / "cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        allowed = min(allowed, -(-int(quota) // int(period)))
    return max(1, allowed)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
