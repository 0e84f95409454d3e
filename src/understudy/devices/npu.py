"""Ascend NPUs through torch_npu. Not yet verified on a device."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from understudy.devices.attention import AttentionRule, DocumentAttention, Documents
from understudy.devices.device import DeviceDescription

__all__ = ["NPU"]


class NPU:
    name = "npu"
    backend = "hccl"
    fused_adamw = False
    """torch_npu's own fused AdamW differs from PyTorch's in its arguments."""
    compute_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    flash_attention: DocumentAttention | None = None

    def __init__(self) -> None:
        self.attention: DocumentAttention | None = FusionAttention()

    @staticmethod
    def available() -> bool:
        if find_spec("torch_npu") is None:
            return False
        import torch_npu  # noqa: F401  # importing it registers the device with PyTorch

        return bool(_npu().is_available())

    def torch_device(self, local_rank: int) -> torch.device:
        device = torch.device("npu", local_rank)
        _npu().set_device(device)
        return device

    def describe(self) -> tuple[DeviceDescription, ...]:
        found = []
        for index in range(_npu().device_count()):
            free_bytes, total_bytes = _npu().mem_get_info(index)
            found.append(DeviceDescription(str(_npu().get_device_name(index)), int(total_bytes), int(free_bytes)))
        return tuple(found)

    def software(self) -> str:
        return f"torch_npu {metadata.version('torch_npu')}"

    def process_bytes(self, processes: int) -> int:
        return int(_npu().mem_get_info()[1])

    def limit_memory(self, size_bytes: int) -> None:
        """Of the allocator; what driver, kernels and communicators hold is outside of it."""
        _npu().set_per_process_memory_fraction(min(1.0, size_bytes / self.process_bytes(1)))

    def memory_peak_bytes(self) -> int:
        return int(_npu().max_memory_reserved())

    def reset_memory_peak(self) -> None:
        _npu().reset_peak_memory_stats()

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def synchronize(self) -> None:
        _npu().synchronize()


class FusionAttention:
    """`torch_npu.npu_fusion_attention` in its TND layout. Not yet verified on a device."""

    def supports(self, query: Tensor, value: Tensor, rule: AttentionRule) -> bool:
        half = query.dtype in (torch.bfloat16, torch.float16)
        plain = rule.softcap is None and rule.sinks is None
        return half and plain and query.shape[-1] == value.shape[-1] and query.shape[-1] % 16 == 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, rule: AttentionRule) -> Tensor:
        import torch_npu

        ends = torch.tensor(documents.lengths).cumsum(0).tolist()
        # The kernel takes a fixed upper-triangular 2048 × 2048 mask as the pattern of causal (mode 3) or banded
        # (mode 4) attention, whatever the lengths.
        mask = torch.ones(2048, 2048, dtype=torch.bool, device=query.device).triu(1)
        before = documents.longest if rule.window is None else rule.window - 1
        output: Tensor = torch_npu.npu_fusion_attention(
            query,
            key,
            value,
            query.shape[1],
            input_layout="TND",
            atten_mask=mask,
            scale=rule.scale,
            keep_prob=1.0 - rule.dropout,
            pre_tockens=before,
            next_tockens=0,
            sparse_mode=3 if rule.window is None else 4,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
        )[0]
        return output


def _npu() -> Any:
    """torch.npu, which exists once torch_npu is imported."""
    return torch.npu  # type: ignore[attr-defined]
