"""Small whole numbers packed in 32-bit words, and scales that are stored in whatever dtype a model had."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from understudy.contracts import LazyTensor

__all__ = ["WORD_BITS", "unpack_words", "widened"]

WORD_BITS = 32


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """`words` [rows, n] int32 to the codes in them [rows, n · 32 ÷ bits] int16, each word's lowest first."""
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
    # What shifting a negative word brings in from the left is masked away.
    return (words.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1).to(torch.int16).flatten(1)


def widened(sources: Mapping[str, LazyTensor], *names: str) -> dict[str, LazyTensor]:
    """`sources` with those of `names` as fp32, so that a layer's layout does not depend on the dtype they have."""
    return {name: _Widened(source) if name in names else source for name, source in sources.items()}


class _Widened:
    """A `LazyTensor` of floating-point numbers as fp32."""

    dtype = torch.float32

    def __init__(self, stored: LazyTensor) -> None:
        self._stored = stored
        self.shape = tuple(stored.shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        return self._stored[index].to(self.dtype)
