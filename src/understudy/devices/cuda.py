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
        self.compute_dtypes: tuple[torch.dtype, ...] = (
            (torch.bfloat16, torch.float16, torch.float32)
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else (torch.float16, torch.float32)
        )
        # Flash attention's kernels need Ampere (compute capability 8.0) or newer.
        ampere = torch.cuda.get_device_capability()[0] >= 8
        self.attention: DocumentAttention | None = VariableLengthAttention() if ampere else None
        self.flash_attention: DocumentAttention | None = FlashAttention() if FlashAttention.installed() else None

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
