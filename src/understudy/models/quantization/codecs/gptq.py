"""GPTQ checkpoints (Frantar et al., 2023): whole numbers in int32 words along the inputs, a scale and a zero a group.

The format is that of AutoGPTQ and GPTQModel, with codes of 2, 4 or 8 bits: `qweight` [in ÷ n, out], the first of a
word's n codes lowest; `qzeros` [groups, out ÷ n]; `scales` [groups, out]; `g_idx` [in], the group of each input.
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

__all__ = ["GPTQ", "scheme_of"]


def scheme_of(section: Mapping[str, Any]) -> Scheme | None:
    """What config.json's `quantization_config` describes, if it is this format."""
    if section.get("quant_method") != "gptq":
        return None
    bits, group_size = section.get("bits"), section.get("group_size", -1)
    file_format = "marlin" if section.get("is_marlin_format") else section.get("checkpoint_format") or "gptq"
    if bits not in (2, 4, 8) or not isinstance(group_size, int):
        raise unreadable(f"GPTQ in {bits} bits")
    if file_format not in ("gptq", "gptq_v2"):
        raise unreadable(f"GPTQ in the file format {file_format}")
    # Keys that begin with "-:" name layers that are left as they are.
    if any(not str(key).startswith("-:") for key in section.get("dynamic") or ()):
        raise unreadable("GPTQ with settings that differ from layer to layer (dynamic)")
    zeros_less_one = file_format == "gptq"
    codec = partial(GPTQ, bits=bits, group_size=group_size, zeros_less_one=zeros_less_one)
    return Scheme(f"GPTQ, {bits} bits", "qweight", codec)


class GPTQ(Codec):
    """`zeros_less_one`: stored zeros are one less than meant, as in files before `gptq_v2`. `group_size` -1 is all."""

    def __init__(
        self, out_features: int, in_features: int, *, bits: int, group_size: int, zeros_less_one: bool
    ) -> None:
        self.bits, self.zeros_less_one = bits, zeros_less_one
        groups = 1 if group_size == -1 else -(-in_features // group_size)
        per_word = WORD_BITS // bits
        if in_features % per_word or out_features % per_word:
            raise unreadable(f"GPTQ in {bits} bits in layers of {in_features} by {out_features}")
        super().__init__(
            [
                Segment("qweight", torch.int32, (in_features // per_word, out_features)),
                Segment("qzeros", torch.int32, (groups, out_features // per_word)),
                Segment("scales", torch.float32, (groups, out_features)),
                Segment("g_idx", torch.int32, (in_features,)),
            ]
        )

    def sources(self, read: Callable[[str], LazyTensor]) -> Mapping[str, LazyTensor]:
        return widened(super().sources(read), "scales")

    def dequantize(self, packed: Tensor) -> Tensor:
        parts = self.parts(packed)
        zeros = parts["qzeros"]
        if self.zeros_less_one:
            # Over the whole word, so that what taking one away borrowed from the neighbour goes back.
            zeros = zeros + _ones(self.bits)
        codes = unpack_words(parts["qweight"].t(), self.bits)
        group = parts["g_idx"].long()
        scales = parts["scales"].t()
        weight = codes.sub_(unpack_words(zeros, self.bits).t()[:, group]).to(scales.dtype)
        return weight.mul_(scales[:, group]).to(packed.dtype)


def _ones(bits: int) -> int:
    """A word of 1 in every code."""
    return sum(1 << shift for shift in range(0, WORD_BITS, bits))
