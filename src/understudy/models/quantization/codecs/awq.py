"""AWQ checkpoints (Lin et al., 2024): 4-bit numbers in int32 words along the outputs, a scale and a zero a group.

The format is AutoAWQ's `gemm`: `qweight` [in, out ÷ 8], `qzeros` [groups, out ÷ 8], `scales` [groups, out].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from understudy.contracts import LazyTensor
from understudy.models.quantization.codec import Codec, Scheme, Segment, unreadable
from understudy.models.quantization.words import WORD_BITS, unpack_words, widened

__all__ = ["AWQ", "scheme_of"]

_BITS = 4
_PER_WORD = WORD_BITS // _BITS
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word each of eight neighbouring outputs is: the order that AutoAWQ's kernels want."""


def scheme_of(section: Mapping[str, Any]) -> Scheme | None:
    """What config.json's `quantization_config` describes, if it is this format."""
    if section.get("quant_method") != "awq":
        return None
    file_format = str(section.get("version") or section.get("format") or "gemm").lower()
    bits, group_size = section.get("bits", 4), section.get("group_size", 128)
    if file_format != "gemm" or bits != _BITS or not isinstance(group_size, int):
        raise unreadable(f"AWQ in {bits} bits in the file format {file_format}")
    if not section.get("zero_point", True):
        raise unreadable("AWQ without zero points")
    return Scheme("AWQ", "qweight", partial(AWQ, group_size=group_size))


class AWQ(Codec):
    """`group_size` -1 is all inputs."""

    def __init__(self, out_features: int, in_features: int, *, group_size: int) -> None:
        self.group_size = in_features if group_size == -1 else group_size
        if in_features % self.group_size or out_features % _PER_WORD:
            raise unreadable(f"AWQ in layers of {in_features} by {out_features}")
        groups = in_features // self.group_size
        super().__init__(
            [
                Segment("qweight", torch.int32, (in_features, out_features // _PER_WORD)),
                Segment("qzeros", torch.int32, (groups, out_features // _PER_WORD)),
                Segment("scales", torch.float32, (groups, out_features)),
            ]
        )

    def sources(self, read: Callable[[str], LazyTensor]) -> Mapping[str, LazyTensor]:
        return widened(super().sources(read), "scales")

    def dequantize(self, packed: Tensor) -> Tensor:
        parts = self.parts(packed)
        codes = _in_order(unpack_words(parts["qweight"], _BITS))
        zeros = _in_order(unpack_words(parts["qzeros"], _BITS))
        grouped = codes.view(-1, self.group_size, codes.shape[1]).sub_(zeros.unsqueeze(1))
        weight = grouped.to(torch.float32).mul_(parts["scales"].unsqueeze(1)).flatten(0, 1)
        return weight.t().to(packed.dtype).contiguous()


def _in_order(codes: Tensor) -> Tensor:
    """[rows, outputs], each word's codes put in the outputs' order."""
    return codes.view(len(codes), -1, _PER_WORD)[:, :, _PLACES].flatten(1)
