"""The host's processor."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from understudy.devices.attention import DocumentAttention

__all__ = ["CPU"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class CPU:
    name = "cpu"
    backend = "gloo"
    fused_adamw = True
    compute_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    attention: DocumentAttention | None = None
    flash_attention: DocumentAttention | None = None

    def torch_device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

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
