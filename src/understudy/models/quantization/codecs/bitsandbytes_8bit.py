"""int8 as bitsandbytes stores it: whole numbers with one scale a row (Dettmers et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from understudy.contracts import LazyTensor
from understudy.models.quantization.bitsandbytes_package import bitsandbytes_functional
from understudy.models.quantization.codec import Codec, Scheme, Segment, unreadable

__all__ = ["EightBit", "quantize", "scheme_of"]

_CODES = "weight"
_SCALES = "SCB"
_ORDER = "weight_format"


def scheme_of(section: Mapping[str, Any]) -> Scheme | None:
    """What config.json's `quantization_config` describes, if it is this format."""
    eight_bit = section.get("load_in_8bit") or section.get("_load_in_8bit")
    if section.get("quant_method", "bitsandbytes") != "bitsandbytes" or not eight_bit:
        return None
    return Scheme("int8", _SCALES, EightBit)


class EightBit(Codec):
    """Codes [out, in] and each row's largest magnitude, which 127 stands for.

    Only the weight is quantized: LLM.int8() also rounds the layer's input to 8 bits, and this does not, so that outputs
    are closer to the original model's than those of bitsandbytes' own layer.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        bitsandbytes_functional()
        super().__init__(
            [
                Segment(_CODES, torch.int8, (out_features, in_features)),
                Segment(_SCALES, torch.float32, (out_features,)),
            ]
        )

    def sources(self, read: Callable[[str], LazyTensor]) -> Mapping[str, LazyTensor]:
        """Old files may hold codes in an order that some GPUs wanted, which the small tensor beside them tells."""
        if read(_ORDER)[()].any():
            raise unreadable("int8 that is not in the order of rows")
        return super().sources(read)

    def dequantize(self, packed: Tensor) -> Tensor:
        parts = self.parts(packed)
        weight: Tensor = bitsandbytes_functional().int8_vectorwise_dequant(parts[_CODES], parts[_SCALES])
        return weight.to(packed.dtype)


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """What is stored for `weight` [out, in] fp32, by names after the layer's."""
    scales = weight.abs().amax(dim=1)
    # Any divisor does for a row of zeros.
    divisor = scales.clamp(min=torch.finfo(torch.float32).tiny * 128)
    codes = torch.round(weight * (127.0 / divisor).unsqueeze(1)).to(torch.int8)
    return {_CODES: codes, _SCALES: scales, _ORDER: torch.zeros((), dtype=torch.uint8)}
