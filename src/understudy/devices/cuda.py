"""NVIDIA GPUs (and AMD's under ROCm, which answer to the same API). Not yet verified on a device."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from understudy.devices.attention import DocumentAttention
from understudy.devices.device import DeviceDescription
from understudy.devices.flash import FlashAttention, VariableLengthAttention

__all__ = ["CUDA"]

_DRIVER = Path("/proc/driver/nvidia/version")


class CUDA:
    name = "cuda"
    backend = "nccl"
    fused_adamw = True

    def __init__(self) -> None:
        # Nothing here may ask the driver about a device: that opens a context on it, and the parent process of a run
        # has no business on a GPU.
        self.attention: DocumentAttention | None = VariableLengthAttention()
        self.flash_attention: DocumentAttention | None = FlashAttention() if FlashAttention.installed() else None

    @property
    def compute_dtypes(self) -> tuple[torch.dtype, ...]:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return (torch.bfloat16, torch.float16, torch.float32)
        return (torch.float16, torch.float32)

    @staticmethod
    def available() -> bool:
        return torch.cuda.is_available()

    def torch_device(self, local_rank: int) -> torch.device:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device

    def describe(self) -> tuple[DeviceDescription, ...]:
        found = []
        for index in range(torch.cuda.device_count()):
            free_bytes, total_bytes = torch.cuda.mem_get_info(index)
            found.append(DeviceDescription(torch.cuda.get_device_name(index), total_bytes, free_bytes))
        return tuple(found)

    def software(self) -> str:
        built = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        driver = re.search(r"(\d+\.\d+[.\d]*)", _DRIVER.read_text()) if _DRIVER.exists() else None
        return f"PyTorch for {built}" + (f", driver {driver[1]}" if driver else "")

    def process_bytes(self, processes: int) -> int:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory

    def limit_memory(self, size_bytes: int) -> None:
        """Of the allocator; what driver, kernels and communicators hold is outside of it."""
        torch.cuda.set_per_process_memory_fraction(min(1.0, size_bytes / self.process_bytes(1)))

    def memory_peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved()

    def reset_memory_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def synchronize(self) -> None:
        torch.cuda.synchronize()
