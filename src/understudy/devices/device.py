"""What the rest of the program may ask of a device; only the files beside this one name a device API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from understudy.devices.attention import DocumentAttention

__all__ = ["Device", "DeviceDescription", "find_device"]


@dataclass(frozen=True)
class DeviceDescription:
    """One device of this machine."""

    name: str
    total_bytes: int
    free_bytes: int
    """Of its memory; other processes may hold the rest."""


class Device(Protocol):
    """One kind of device, seen from one process."""

    name: str
    """cpu, cuda or npu."""
    backend: str
    """Collective backend for torch.distributed."""
    fused_adamw: bool
    """Whether torch.optim.AdamW(fused=True) has a kernel here."""
    attention: DocumentAttention | None
    """Variable-length attention of PyTorch or the vendor; None where attention runs document by document."""
    flash_attention: DocumentAttention | None
    """The flash-attn package's, where it is installed."""

    @property
    def compute_dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes that matrix products run in at full speed, the preferred one for training first."""
        ...

    def torch_device(self, local_rank: int) -> torch.device:
        """This process's device, made current."""
        ...

    def describe(self) -> tuple[DeviceDescription, ...]:
        """Every device of the kind that this process may use; each of them is opened."""
        ...

    def software(self) -> str:
        """What drives the device, with versions, as far as it tells."""
        ...

    def process_bytes(self, processes: int) -> int:
        """Memory that one of `processes` of this host may have: its device's, or its part of the host's on a CPU."""
        ...

    def limit_memory(self, size_bytes: int) -> None:
        """Lets this process have no more than `size_bytes` of its device's memory. What asks for more fails, as where
        there is no more. Raises `UserError` where the process holds as much already, or it cannot be limited."""
        ...

    def memory_peak_bytes(self) -> int:
        """Most memory held at once since `reset_memory_peak`: the allocator's, or the process's own on a CPU."""
        ...

    def reset_memory_peak(self) -> None: ...

    def seed(self, seed: int) -> None:
        """Seeds every generator a forward pass draws from."""
        ...

    def synchronize(self) -> None:
        """Waits until all work given to the device is done."""
        ...


def find_device() -> Device:
    """The accelerator of this machine that PyTorch can use, else the CPU."""
    from understudy.devices.cpu import CPU
    from understudy.devices.cuda import CUDA
    from understudy.devices.npu import NPU

    for kind in (CUDA, NPU):
        if kind.available():
            return kind()
    return CPU()
