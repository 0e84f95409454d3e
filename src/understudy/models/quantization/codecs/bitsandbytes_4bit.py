"""NF4 and FP4 as bitsandbytes stores them: 4-bit codes in blocks of 64, one scale each (Dettmers et al., 2023)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from understudy.contracts import LazyTensor
from understudy.models.quantization.bitsandbytes_package import bitsandbytes_functional
from understudy.models.quantization.codec import Codec, Scheme, Segment, unreadable

__all__ = ["FourBit", "dynamic_map", "quantize", "scheme_of"]

_BLOCK = 64
_NESTED_BLOCK = 256
_CODES = "weight"
_SCALES = "weight.absmax"
_NESTED_SCALES = "weight.nested_absmax"
_NESTED_OFFSET = "weight.nested_offset"


def scheme_of(section: Mapping[str, Any]) -> Scheme | None:
    """What config.json's `quantization_config` describes, if it is this format."""
    four_bit = section.get("load_in_4bit") or section.get("_load_in_4bit")
    if section.get("quant_method", "bitsandbytes") != "bitsandbytes" or not four_bit:
        return None
    data_type = section.get("bnb_4bit_quant_type", "fp4")
    if data_type not in ("nf4", "fp4"):
        raise unreadable(f"{data_type}, a 4-bit type")
    nested = bool(section.get("bnb_4bit_use_double_quant", False))
    return Scheme(data_type, _SCALES, partial(FourBit, data_type=data_type, nested=nested))


class FourBit(Codec):
    """Codes, scales and, where scales are quantized too (`nested`), the scales and the offset of those."""

    def __init__(self, out_features: int, in_features: int, *, data_type: str, nested: bool) -> None:
        bitsandbytes_functional()
        self.shape = torch.Size((out_features, in_features))
        self.data_type, self.nested = data_type, nested
        elements = out_features * in_features
        blocks = -(-elements // _BLOCK)
        segments = [
            Segment(_CODES, torch.uint8, (-(-elements // 2), 1)),
            Segment(_SCALES, torch.uint8 if nested else torch.float32, (blocks,)),
        ]
        if nested:
            segments.append(Segment(_NESTED_SCALES, torch.float32, (-(-blocks // _NESTED_BLOCK),)))
            segments.append(Segment(_NESTED_OFFSET, torch.float32, (1,)))
        super().__init__(segments)

    def sources(self, read: Callable[[str], LazyTensor]) -> Mapping[str, LazyTensor]:
        """Reads the small description that is stored beside the codes, since the offset is there."""
        stored = bytes(read(f"weight.quant_state.bitsandbytes__{self.data_type}")[:].tolist())
        description: dict[str, Any] = json.loads(stored)
        if description.get("blocksize") != _BLOCK or description.get("nested_blocksize", 256) != _NESTED_BLOCK:
            raise unreadable(f"{self.data_type} in blocks of {description.get('blocksize')}")
        names = [segment.name for segment in self.segments if segment.name != _NESTED_OFFSET]
        sources: dict[str, LazyTensor] = {name: read(name) for name in names}
        if self.nested:
            sources[_NESTED_OFFSET] = torch.tensor([float(description["nested_offset"])], dtype=torch.float32)
        return sources

    def dequantize(self, packed: Tensor) -> Tensor:
        functional = bitsandbytes_functional()
        parts = self.parts(packed)
        offset = state2 = None
        if self.nested:
            offset = parts[_NESTED_OFFSET][0]
            state2 = functional.QuantState(
                absmax=parts[_NESTED_SCALES],
                blocksize=_NESTED_BLOCK,
                code=dynamic_map(packed.device),
                dtype=torch.float32,
            )
        state = functional.QuantState(
            absmax=parts[_SCALES],
            shape=self.shape,
            blocksize=_BLOCK,
            quant_type=self.data_type,
            dtype=packed.dtype,
            offset=offset,
            state2=state2,
        )
        weight: Tensor = functional.dequantize_4bit(parts[_CODES], state)
        return weight.reshape(self.shape)


def quantize(weight: Tensor, *, data_type: str, nested: bool) -> dict[str, Tensor]:
    """What is stored for `weight` [out, in] fp32, by names after the layer's."""
    functional = bitsandbytes_functional()
    codes, state = functional.quantize_4bit(weight, blocksize=_BLOCK, compress_statistics=nested, quant_type=data_type)
    return {_CODES: codes, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of 8-bit scales (Dettmers et al., 2022)."""
    return torch.as_tensor(bitsandbytes_functional().create_dynamic_map(), dtype=torch.float32, device=device)
