"""What a plan says: a row for each strategy, the one that is taken, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from understudy.plan.hardware.hardware import Hardware
from understudy.plan.memory.activations import Checkpointing
from understudy.plan.shape.model import ModelShape
from understudy.recipe.schema import DDP, FSDP, DeepSpeed

__all__ = ["Plan", "Row"]


@dataclass(frozen=True)
class Row:
    """One strategy at its best: of what fits the fastest, or else what takes least memory."""

    name: str
    """The preset's, or for one that is none of them its kind and settings."""
    strategy: DDP | FSDP | DeepSpeed
    fits: bool
    reason: str | None
    """Why it does not fit or cannot be taken."""
    refused: bool
    """The recipe's rules do not allow it."""
    device_peak_bytes: int
    """Of all that a process takes on its device."""
    tensor_peak_bytes: int
    """Of tensors alone, which is what an allocator calls allocated."""
    host_peak_bytes: int
    """On one host."""
    disk_bytes: int
    """On one host's disk, where a strategy offloads to NVMe."""
    micro_batch_tokens: int
    """The most that fits, and that a step has for a device."""
    micro_batches: int
    """In a step of examples that are as long as they may be."""
    activation_checkpointing: Checkpointing
    tokens_per_second_per_device: float
    step_seconds: float
    bound: str
    """compute, memory bandwidth, interconnect or host link."""
    seconds: dict[str, float]
    """Of a step, by what they go to; some overlap."""
    peak_moment: str
    breakdown: dict[str, int]
    """Bytes of each part at the peak."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "fits": self.fits,
            "reason": self.reason,
            "device_peak_bytes": self.device_peak_bytes,
            "tensor_peak_bytes": self.tensor_peak_bytes,
            "host_peak_bytes": self.host_peak_bytes,
            "disk_bytes": self.disk_bytes,
            "micro_batch_tokens": self.micro_batch_tokens,
            "micro_batches": self.micro_batches,
            "activation_checkpointing": self.activation_checkpointing,
            "buckets": self.strategy.buckets if isinstance(self.strategy, DeepSpeed) else None,
            "tokens_per_second_per_device": round(self.tokens_per_second_per_device, 1),
            "step_seconds": round(self.step_seconds, 4),
            "bound": self.bound,
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            "peak_moment": self.peak_moment,
            "breakdown_bytes": self.breakdown,
        }


@dataclass(frozen=True)
class Plan:
    hardware: Hardware
    limit_bytes: int
    """Of a device's memory, what a process may take."""
    shape: ModelShape
    trained: int
    """Parameters."""
    precision: str
    rows: tuple[Row, ...]
    chosen: Row | None
    why: str
    """Why the chosen one wins, or why nothing fits."""
    lever: str | None
    """Where nothing fits, what would make it fit."""
    nearest: Row | None = None
    """Where nothing fits, what comes nearest of that which can be taken."""

    def to_json(self) -> dict[str, Any]:
        accelerator = self.hardware.accelerator
        return {
            "hardware": {
                "name": self.hardware.name,
                "devices": self.hardware.devices,
                "nodes": self.hardware.nodes,
                "device_bytes": accelerator.device_bytes,
                "usable_bytes": self.limit_bytes,
                "host_bytes": self.hardware.host_bytes or None,
            },
            "model": {
                "type": self.shape.sizes.model_type,
                "parameters": self.shape.count,
                "trained": self.trained,
                "by_component": self.shape.by_component,
            },
            "precision": self.precision,
            "chosen": None if self.chosen is None else self.chosen.name,
            "why": self.why,
            "lever": self.lever,
            "strategies": [row.to_json() for row in self.rows],
        }
