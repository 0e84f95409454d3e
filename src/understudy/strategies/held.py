"""How much memory the weights take that one process holds between steps."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from understudy.contracts import HeldBytes

__all__ = ["held_bytes"]


def held_bytes(module: nn.Module) -> HeldBytes:
    """Of the parameters of a wrapped `module`: of a sharded one its share, of a partitioned one (ZeRO-3) its partition
    and, where it is small and so kept whole too, the whole. DeepSpeed's fp32 masters are not counted."""
    totals = {False: 0, True: 0}
    for parameter in module.parameters():
        shown: Any = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
        held = shown.numel() * shown.element_size()
        if (partition := getattr(parameter, "ds_tensor", None)) is not None:
            held += partition.numel() * partition.element_size()
        totals[parameter.requires_grad] += held
    return HeldBytes(frozen=totals[False], trained=totals[True])
