"""NVIDIA GPUs (and AMD's under ROCm, which answer to the same API). Not yet verified on a device."""

from __future__ import annotations

import torch

from understudy.devices.attention import DocumentAttention
from understudy.devices.flash import FlashAttention, VariableLengthAttention

__all__ = ["CUDA"]


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

    def memory_peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved()

    def reset_memory_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def synchronize(self) -> None:
        torch.cuda.synchronize()
