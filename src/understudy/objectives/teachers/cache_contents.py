"""What a teacher cache can hold a supervised position, as rows of fixed size: top-k, samples or hidden states.

Shape letters: N supervised positions, k ids kept of each, m ids drawn, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from understudy.contracts import TensorSpec
from understudy.errors import UserError

__all__ = [
    "CONTENTS",
    "LOG_PROB_ERROR",
    "Contents",
    "Hidden",
    "HiddenRows",
    "Rows",
    "SampleRows",
    "Samples",
    "TopK",
    "TopKRows",
]

STEPS_PER_NAT = 1024
"""Log-probabilities are stored in steps of 2⁻¹⁰ nats, which two bytes count down to −64. An fp16 is eight times coarser
at −10, where the least likely of 64 ids often is, and finer only above −1."""
SMALLEST = 2**16 - 2
"""Code of everything at or below −63.998 nats, a probability of 2·10⁻²⁸."""
IMPOSSIBLE = 2**16 - 1
"""Code of −inf."""
LOG_PROB_ERROR = 0.5 / STEPS_PER_NAT
"""Largest error of a log-probability above −63.998 that comes back."""
MASS_TOLERANCE = 0.01

LOW_BITS = 16
LARGEST_VOCABULARY = 2**24


class TopKRows(NamedTuple):
    """The likeliest ids at each position. A row's probabilities and its tail sum to one, as far as they are rounded."""

    ids: Tensor
    """[N, k] int64."""
    log_probs: Tensor
    """[N, k] fp32, nats, at the teacher's temperature."""
    tail: Tensor
    """[N] fp32: the log of the mass on all other ids; −inf where there is none."""


class SampleRows(NamedTuple):
    """Ids drawn from the teacher at each position, with replacement."""

    ids: Tensor
    """[N, m] int64."""


class HiddenRows(NamedTuple):
    """What the teacher's head is applied to."""

    hidden: Tensor
    """[N, H], in the stored dtype."""


Rows = TopKRows | SampleRows | HiddenRows


@dataclass(frozen=True)
class TopK:
    """The `k` likeliest ids with log-probabilities at `temperature`, and a tail bucket: 2 bytes a number, and the bits
    that an id has above sixteen."""

    kind: ClassVar[str] = "top_k"
    k: int
    temperature: float
    vocabulary_size: int

    def __post_init__(self) -> None:
        _check_ids(self.k, self.vocabulary_size)
        _check_temperature(self)

    def layout(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of one row of each stored tensor."""
        values = {"log_probs": TensorSpec((self.k,), torch.uint16), "tail": TensorSpec((), torch.uint16)}
        return {**_ids_layout(self.k, self.vocabulary_size), **values}

    def encode(self, rows: Rows) -> dict[str, Tensor]:
        """The stored form of TopKRows on the CPU. Raises `UserError` where the teacher gave NaN, `ValueError` where
        a row's mass is not one."""
        assert isinstance(rows, TopKRows)
        mass = torch.logsumexp(torch.cat([rows.log_probs, rows.tail.unsqueeze(1)], dim=1), dim=1)
        _check_finite(mass)
        if bool((mass.abs() > MASS_TOLERANCE).any()):
            raise ValueError("log-probabilities and tail of a row must sum to a mass of one")
        return {
            **_pack_ids(rows.ids, self.k, self.vocabulary_size),
            "log_probs": _quantize(rows.log_probs),
            "tail": _quantize(rows.tail),
        }

    def decode(self, stored: Mapping[str, Tensor]) -> TopKRows:
        """Ids exact and in their order, log-probabilities within LOG_PROB_ERROR. A row's mass is within that of one, so
        renormalise before comparing: the error of a divergence is then of second order."""
        ids = _unpack_ids(stored, self.k, self.vocabulary_size)
        return TopKRows(ids, _dequantize(stored["log_probs"]), _dequantize(stored["tail"]))


@dataclass(frozen=True)
class Samples:
    """`m` ids drawn at `temperature`; `seed` is that of the draws."""

    kind: ClassVar[str] = "samples"
    m: int
    temperature: float
    seed: int
    vocabulary_size: int

    def __post_init__(self) -> None:
        _check_ids(self.m, self.vocabulary_size)
        _check_temperature(self)

    def layout(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of one row of each stored tensor."""
        return _ids_layout(self.m, self.vocabulary_size)

    def encode(self, rows: Rows) -> dict[str, Tensor]:
        """The stored form of SampleRows on the CPU."""
        assert isinstance(rows, SampleRows)
        return _pack_ids(rows.ids, self.m, self.vocabulary_size)

    def decode(self, stored: Mapping[str, Tensor]) -> SampleRows:
        """As it was encoded, to the bit."""
        return SampleRows(_unpack_ids(stored, self.m, self.vocabulary_size))


@dataclass(frozen=True)
class Hidden:
    """The last hidden states as they are, for whoever has the teacher's head: any temperature, any divergence."""

    kind: ClassVar[str] = "hidden"
    hidden_size: int
    dtype: Literal["bf16", "fp32"]

    def layout(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of one row of each stored tensor."""
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]
        return {"hidden": TensorSpec((self.hidden_size,), dtype)}

    def encode(self, rows: Rows) -> dict[str, Tensor]:
        """The stored form of HiddenRows on the CPU, in `dtype`. Raises `UserError` for one that is not finite."""
        assert isinstance(rows, HiddenRows)
        stored = rows.hidden.to(self.layout()["hidden"].dtype)
        _check_finite(stored)
        return {"hidden": stored}

    def decode(self, stored: Mapping[str, Tensor]) -> HiddenRows:
        """As it was encoded, to the bit."""
        return HiddenRows(stored["hidden"])


Contents = TopK | Samples | Hidden

CONTENTS: Mapping[str, type[TopK] | type[Samples] | type[Hidden]] = MappingProxyType(
    {contents.kind: contents for contents in (TopK, Samples, Hidden)}
)


def _check_ids(count: int, vocabulary_size: int) -> None:
    if not (0 < vocabulary_size <= LARGEST_VOCABULARY and count > 0):
        raise ValueError(f"{count} ids of a vocabulary of {vocabulary_size}")


def _check_temperature(contents: TopK | Samples) -> None:
    if not contents.temperature > 0:
        raise ValueError(f"a temperature of {contents.temperature}")
    # 1 and 1.0 are one temperature, and must be written alike where the identity is taken.
    object.__setattr__(contents, "temperature", float(contents.temperature))


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise UserError(
            "the teacher gave numbers that are not finite; run it in a wider precision (bf16 or fp32 instead of fp16), "
            "and see that its weights are whole."
        )


def _quantize(log_probs: Tensor) -> Tensor:
    codes = np.rint(log_probs.float().numpy() * np.float32(-STEPS_PER_NAT))
    finite = np.clip(codes, 0, SMALLEST)  # a hair above 0 comes from rounding in a softmax
    return torch.from_numpy(np.where(np.isinf(codes), IMPOSSIBLE, finite).astype(np.uint16))


def _dequantize(codes: Tensor) -> Tensor:
    log_probs = codes.to(torch.float32).mul_(-1 / STEPS_PER_NAT)
    return log_probs.masked_fill_(codes.to(torch.int32) == IMPOSSIBLE, -torch.inf)


def _high_bits(vocabulary_size: int) -> int:
    """Bits that an id of this vocabulary has above the sixteen of its low part."""
    return max(0, (vocabulary_size - 1).bit_length() - LOW_BITS)


def _ids_layout(count: int, vocabulary_size: int) -> dict[str, TensorSpec]:
    layout = {"ids": TensorSpec((count,), torch.uint16)}
    if high_bits := _high_bits(vocabulary_size):
        layout["ids_high"] = TensorSpec(((count * high_bits + 7) // 8,), torch.uint8)
    return layout


def _pack_ids(ids: Tensor, count: int, vocabulary_size: int) -> dict[str, Tensor]:
    """The low sixteen bits of each id, and what is above of a whole row as one run of bits, lowest first."""
    whole: npt.NDArray[Any] = ids.numpy()
    if whole.ndim != 2 or whole.shape[1] != count:
        raise ValueError(f"ids of shape {list(whole.shape)} where [N, {count}] is expected")
    if whole.size and not (whole.min() >= 0 and whole.max() < vocabulary_size):
        raise ValueError(f"ids from {whole.min()} to {whole.max()} in a vocabulary of {vocabulary_size}")
    packed = {"ids": torch.from_numpy((whole & 0xFFFF).astype(np.uint16))}
    if high_bits := _high_bits(vocabulary_size):
        high = (whole >> LOW_BITS).astype(np.uint8)[:, :, None] >> np.arange(high_bits, dtype=np.uint8) & 1
        bits = high.reshape(len(whole), count * high_bits)
        packed["ids_high"] = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))
    return packed


def _unpack_ids(stored: Mapping[str, Tensor], count: int, vocabulary_size: int) -> Tensor:
    ids = stored["ids"].to(torch.int64)
    if high_bits := _high_bits(vocabulary_size):
        bits = np.unpackbits(stored["ids_high"].numpy(), axis=1, count=count * high_bits, bitorder="little")
        places = np.arange(LOW_BITS, LOW_BITS + high_bits)
        high = (bits.reshape(-1, count, high_bits).astype(np.int64) << places).sum(axis=2)
        ids += torch.from_numpy(high)
    return ids
