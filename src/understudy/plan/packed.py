"""Bytes of quantized weights, as `models.quantization` lays them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from understudy.errors import UserError
from understudy.recipe.quantization import Quantization

__all__ = ["PackedBytes", "packing_of"]

PackedBytes = Callable[[int, int], int]
"""From a linear layer's outputs and inputs."""
_ALIGNMENT = 16


def packing_of(quantization: Quantization | None, config: Mapping[str, Any]) -> PackedBytes | None:
    """What the recipe asks for, or what a model that is quantized already is stored as. Raises `UserError` for a format
    that is not read."""
    section = config.get("quantization_config")
    if quantization is not None:
        return (
            _eight_bit
            if quantization.bits == 8
            else lambda outputs, inputs: _four_bit(outputs, inputs, nested=quantization.nested)
        )
    if not isinstance(section, Mapping):
        return None
    method = section.get("quant_method", "bitsandbytes")
    if method == "bitsandbytes" and (section.get("load_in_8bit") or section.get("_load_in_8bit")):
        return _eight_bit
    if method == "bitsandbytes":
        nested = bool(section.get("bnb_4bit_use_double_quant", False))
        return lambda outputs, inputs: _four_bit(outputs, inputs, nested=nested)
    settings = section.get("quant_config")
    inner = settings.get("weight_quant_params") if isinstance(settings, Mapping) else None
    bits = inner.get("nbits") if isinstance(inner, Mapping) else section.get("bits", 4)
    group = (inner or section).get("group_size", 128)
    if method not in ("gptq", "awq", "hqq") or not isinstance(bits, int) or not isinstance(group, int):
        raise UserError(f"the planner does not know how large a model is that is stored as {method!s:.40}.")
    return lambda outputs, inputs: _grouped(outputs, inputs, bits=bits, group=group, scaled_zeros=method == "hqq")


def _four_bit(outputs: int, inputs: int, *, nested: bool) -> int:
    """Codes in blocks of 64 with a scale each; scales in 8 bits, in blocks of 256, where they are nested."""
    elements = outputs * inputs
    blocks = -(-elements // 64)
    segments = [-(-elements // 2), blocks if nested else 4 * blocks]
    return _aligned([*segments, 4 * -(-blocks // 256), 4] if nested else segments)


def _eight_bit(outputs: int, inputs: int) -> int:
    return _aligned([outputs * inputs, 4 * outputs])


def _grouped(outputs: int, inputs: int, *, bits: int, group: int, scaled_zeros: bool) -> int:
    """Codes, and for each group of inputs a scale in fp32 and a zero, in fp32 too (HQQ) or in as many bits."""
    groups = outputs * (1 if group == -1 else -(-inputs // group))
    zeros = 4 * groups if scaled_zeros else groups * bits // 8
    return _aligned([outputs * inputs * bits // 8, 4 * groups, zeros])


def _aligned(segments: list[int]) -> int:
    return sum(-(-segment // _ALIGNMENT) * _ALIGNMENT for segment in segments)
