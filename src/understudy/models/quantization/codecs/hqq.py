"""HQQ checkpoints (Badri and Shaji, 2023): whole numbers of 1, 2, 4 or 8 bits in bytes, a scale and a zero a group.

The weight is taken as a matrix of groups: [groups, group_size] (`axis` 1) or [group_size, groups] (`axis` 0). `W_q`
holds n codes a byte: the first of n equal blocks of its rows in the highest bits. `scale` and `zero` are one a group,
and zeros are no whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from understudy.contracts import LazyTensor
from understudy.models.quantization.codec import Codec, Scheme, Segment, unreadable
from understudy.models.quantization.words import widened

__all__ = ["HQQ", "scheme_of"]


def scheme_of(section: Mapping[str, Any]) -> Scheme | None:
    """What config.json's `quantization_config` describes, if it is this format."""
    if section.get("quant_method") != "hqq":
        return None
    settings = section.get("quant_config")
    weights = settings.get("weight_quant_params") if isinstance(settings, Mapping) else None
    if not isinstance(settings, Mapping) or not isinstance(weights, Mapping):
        raise unreadable("HQQ with settings that differ from layer to layer")
    if settings.get("scale_quant_params") or settings.get("zero_quant_params"):
        raise unreadable("HQQ with quantized scales or zeros")
    bits, group_size, axis = weights.get("nbits"), weights.get("group_size"), weights.get("axis", 0)
    if bits not in (1, 2, 4, 8) or axis not in (0, 1) or not isinstance(group_size, int):
        raise unreadable(f"HQQ in {bits} bits in groups of {group_size}")
    return Scheme(f"HQQ, {bits} bits", "W_q", partial(HQQ, bits=bits, group_size=group_size, axis=axis))


class HQQ(Codec):
    """Dequantizes in fp32; the library does it in the layer's own dtype, where zeros are rounded."""

    def __init__(self, out_features: int, in_features: int, *, bits: int, group_size: int, axis: int) -> None:
        self.shape = (out_features, in_features)
        self.bits = bits
        groups = out_features * in_features // group_size
        rows, columns = (groups, group_size) if axis == 1 else (group_size, groups)
        if groups * group_size != out_features * in_features or rows % (8 // bits):
            raise unreadable(f"HQQ in layers of {in_features} by {out_features}")
        one_a_group = (rows, 1) if axis == 1 else (1, columns)
        super().__init__(
            [
                Segment("W_q", torch.uint8, (rows * bits // 8, columns)),
                Segment("scale", torch.float32, one_a_group),
                Segment("zero", torch.float32, one_a_group),
            ]
        )

    def sources(self, read: Callable[[str], LazyTensor]) -> Mapping[str, LazyTensor]:
        return widened(super().sources(read), "scale", "zero")

    def dequantize(self, packed: Tensor) -> Tensor:
        parts = self.parts(packed)
        mask = (1 << self.bits) - 1
        blocks = [parts["W_q"] >> shift & mask for shift in range(8 - self.bits, -1, -self.bits)]
        weight = torch.cat(blocks).to(torch.float32).sub_(parts["zero"]).mul_(parts["scale"])
        return weight.view(self.shape).to(packed.dtype)
