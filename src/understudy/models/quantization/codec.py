"""How everything that dequantizing one layer needs lies in one flat parameter, so that any strategy can shard it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from understudy.contracts import LazyTensor
from understudy.errors import UserError

__all__ = ["ALIGNMENT", "Codec", "Scheme", "Segment", "unreadable"]

ALIGNMENT = 16
"""Bytes. Every segment starts at a multiple, so it can be viewed as its dtype, and the whole as any storage dtype."""


class Segment(NamedTuple):
    """One tensor among those that make up a layer, under the name it is stored by after the layer's."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Codec(ABC):
    """One layer's layout and the way back to its weight; `segments` lie one after another, aligned.

    The packed tensor is 1-D, of the dtype that the layer computes in (fp32, bf16 or fp16), which stands for bytes only:
    a cast to another dtype destroys it.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self.offsets: dict[str, int] = {}
        self.total_bytes = 0
        for segment in segments:
            self.offsets[segment.name] = self.total_bytes
            self.total_bytes += -(-segment.num_bytes // ALIGNMENT) * ALIGNMENT

    def numel(self, dtype: torch.dtype) -> int:
        """Elements of the packed tensor in the storage dtype `dtype`."""
        return self.total_bytes // dtype.itemsize

    def parts(self, packed: Tensor) -> dict[str, Tensor]:
        """Each segment by its name, as a view of `packed` [numel]; of a copy where `packed` itself is not aligned."""
        if packed.storage_offset() * packed.itemsize % ALIGNMENT:
            packed = packed.clone()
        whole = packed.view(torch.uint8)
        parts = {}
        for segment in self.segments:
            start = self.offsets[segment.name]
            parts[segment.name] = whole[start : start + segment.num_bytes].view(segment.dtype).view(segment.shape)
        return parts

    def sources(self, read: Callable[[str], LazyTensor]) -> Mapping[str, LazyTensor]:
        """The stored tensor behind each segment, with the same bytes; `read` takes a name after the layer's."""
        return {segment.name: read(segment.name) for segment in self.segments}

    @abstractmethod
    def dequantize(self, packed: Tensor) -> Tensor:
        """`packed` [numel] to the weight [out_features, in_features], in the same dtype and on the same device."""


@dataclass(frozen=True)
class Scheme:
    """How a model directory stores its quantized linear layers."""

    name: str
    """For messages, such as `nf4`."""
    marker: str
    """A linear layer is quantized if `<layer>.<marker>` is stored."""
    codec: Callable[[int, int], Codec]
    """From a layer's out_features and in_features."""


def unreadable(what: str) -> UserError:
    """The refusal of a quantized model that cannot be trained on: `what`, such as `GPTQ in 3 bits`."""
    return UserError(
        f"the model is stored as {what:.80}, which cannot be trained on; name the model that it was made from, and set "
        "quantization to have that quantized here.",
        key="model.path",
    )
