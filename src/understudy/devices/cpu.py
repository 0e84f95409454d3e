"""The host's processor."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

from understudy.devices.attention import DocumentAttention
from understudy.devices.detect import detect_machine
from understudy.devices.device import DeviceDescription
from understudy.devices.heap import return_large_blocks
from understudy.devices.host_memory import (
    available_memory_bytes,
    held_data_bytes,
    limit_data,
    usable_memory_bytes,
)
from understudy.errors import UserError

__all__ = ["CPU"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_PROCESSOR = Path("/proc/cpuinfo")


class CPU:
    name = "cpu"
    backend = "gloo"
    fused_adamw = True
    compute_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    attention: DocumentAttention | None = None
    flash_attention: DocumentAttention | None = None

    def torch_device(self, local_rank: int) -> torch.device:
        return_large_blocks()
        return torch.device("cpu")

    def describe(self) -> tuple[DeviceDescription, ...]:
        machine = detect_machine()
        model = re.search(r"^model name\s*:\s*(.+)$", _PROCESSOR.read_text(), re.M) if _PROCESSOR.exists() else None
        name = model[1] if model else "processor"
        total_bytes = usable_memory_bytes()
        return (
            DeviceDescription(f"{name}, {machine.cores} cores", total_bytes, available_memory_bytes() or total_bytes),
        )

    def software(self) -> str:
        return f"vector instructions {torch.backends.cpu.get_cpu_capability()}"

    def process_bytes(self, processes: int) -> int:
        return usable_memory_bytes() // processes

    def limit_memory(self, size_bytes: int) -> None:
        """Of all private memory that the process may write to (`limit_data`), interpreter and libraries included. Linux
        only."""
        held_bytes = held_data_bytes()
        if held_bytes is None:
            raise UserError("a process on a CPU can be limited on Linux only; leave out training.memory_limit.")
        if size_bytes <= held_bytes:
            raise UserError(
                f"a limit of {size_bytes / 2**20:,.0f} MiB is less than the {held_bytes / 2**20:,.0f} MiB that a "
                "process takes before it has a model; raise training.memory_limit."
            )
        limit_data(size_bytes)

    def memory_peak_bytes(self) -> int:
        """Peak resident memory of this process, code and libraries included."""
        if _STATUS.exists():
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def reset_memory_peak(self) -> None:
        """Only where the kernel lets a process reset it (Linux, proc(5)); elsewhere the peak is of its whole life."""
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:
            return

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def synchronize(self) -> None:
        """Work on a CPU is done when it was asked for."""
