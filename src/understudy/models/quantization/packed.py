"""Quantized layers as `LazyTensor`s: any part of a packed weight, put together from ranges of files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from understudy.contracts import LazyTensor
from understudy.errors import UserError
from understudy.models.quantization.codec import Codec
from understudy.models.quantization.linear import QuantizedLinear

__all__ = ["PackedTensor", "packed_tensors"]


class PackedTensor:
    """One layer's packed weight [numel] in `dtype`, the storage dtype. A part of it reads only the rows of the stored
    tensors that hold it.

    `sources` is the stored tensor behind each segment. Raises `UserError`, about `layer`, when one has another size.
    """

    def __init__(self, layer: str, codec: Codec, sources: Mapping[str, LazyTensor], dtype: torch.dtype) -> None:
        for segment in codec.segments:
            source = sources[segment.name]
            if _num_bytes(source) != segment.num_bytes:
                raise UserError(
                    f"{layer}.{segment.name} is {list(source.shape)}, not {list(segment.shape)} as the model's "
                    "configuration says; remove what changes sizes from model.config, or get the model again."
                )
        self._codec, self._sources, self._dtype = codec, sources, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._codec.numel(self._dtype),)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        if isinstance(index, tuple):
            (index,) = index or (slice(None),)
        start, stop, step = index.indices(*self.shape)
        assert step == 1, "parts are contiguous"
        itemsize = self._dtype.itemsize
        return self._bytes(start * itemsize, max(start, stop) * itemsize).view(self._dtype)

    def _bytes(self, start: int, stop: int) -> Tensor:
        part = torch.zeros(stop - start, dtype=torch.uint8)
        for segment in self._codec.segments:
            offset = self._codec.offsets[segment.name]
            first, last = max(start, offset), min(stop, offset + segment.num_bytes)
            if first < last:
                part[first - start : last - start] = _read_bytes(
                    self._sources[segment.name], first - offset, last - offset
                )
        return part


def packed_tensors(reader: Callable[[str], LazyTensor], network: nn.Module) -> Callable[[str], LazyTensor]:
    """`reader` with a `PackedTensor` for the weight of each `QuantizedLinear` of `network`, by its name there.

    All of them are opened, so that what is missing or of a wrong size raises `UserError` here.
    """
    packed = {
        f"{name}.weight": PackedTensor(
            name, module.codec, module.codec.sources(_within(reader, name)), module.weight.dtype
        )
        for name, module in network.named_modules()
        if isinstance(module, QuantizedLinear)
    }

    def read(name: str) -> LazyTensor:
        return packed[name] if name in packed else reader(name)

    return read


def _within(reader: Callable[[str], LazyTensor], layer: str) -> Callable[[str], LazyTensor]:
    return lambda name: reader(f"{layer}.{name}")


def _num_bytes(stored: LazyTensor) -> int:
    return math.prod(stored.shape) * stored.dtype.itemsize


def _read_bytes(stored: LazyTensor, start: int, stop: int) -> Tensor:
    """Bytes [start, stop) of a row-major tensor, reading only the rows that hold them."""
    row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    first_row, last_row = start // row_bytes, -(-stop // row_bytes)
    rows = stored[first_row:last_row].contiguous().view(-1).view(torch.uint8)
    return rows[start - first_row * row_bytes : stop - first_row * row_bytes]
