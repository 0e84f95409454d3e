"""Cuts tokenised examples to the longest allowed, and leaves out what has nothing to train on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from understudy.data.builder import TokenChunk

__all__ = ["Encoded", "Overflow", "Tokenised", "cut"]

Overflow = Literal["truncate", "drop", "split"]


@dataclass(frozen=True)
class Encoded:
    """Whole examples end to end: T tokens of E examples."""

    tokens: npt.NDArray[np.int32]
    """[T]"""
    supervised: npt.NDArray[np.uint8]
    """[T] 1 where supervised."""
    lengths: npt.NDArray[np.int64]
    """[E]"""
    row: Sequence[int]
    """E rows of the source, from 0."""


@dataclass(frozen=True)
class Tokenised:
    """Examples as they will be trained on, and what became of the others."""

    chunk: TokenChunk
    fingerprints: npt.NDArray[np.uint64]
    """[E] hash of each example's tokens, to count exact duplicates."""
    counts: Counter[str]
    """rows; longer ones truncated, split or dropped_long; dropped_unsupervised, without a supervised token to begin
    with; cut_to_prompt, pieces that were left without one."""


def cut(encoded: Encoded, *, source: int, max_length: int, overflow: Overflow) -> Tokenised:
    """Pieces of at most `max_length` tokens. One whose only supervised token is its first is left out: nothing predicts
    that token."""
    counts: Counter[str] = Counter(rows=len(encoded.row))
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(encoded.supervised, dtype=np.int64)])
    pieces: list[tuple[int, int, int, int]] = []
    ends = np.cumsum(encoded.lengths).tolist()
    for end, length, row in zip(ends, encoded.lengths.tolist(), encoded.row):
        for first, last in _pieces(end - length, end, max_length, overflow, counts):
            if trained := _trained(before, first, last):
                pieces.append((first, last, trained, row))
            else:
                counts["cut_to_prompt" if _trained(before, end - length, end) else "dropped_unsupervised"] += 1
    tokens = [encoded.tokens[first:last] for first, last, _, _ in pieces]
    supervised = [encoded.supervised[first:last] for first, last, _, _ in pieces]
    table = np.array(pieces, np.int64).reshape(-1, 4)
    chunk = TokenChunk(
        tokens=np.concatenate(tokens) if tokens else encoded.tokens[:0],
        supervised=np.concatenate(supervised) if supervised else encoded.supervised[:0],
        lengths=(table[:, 1] - table[:, 0]).astype(np.int32),
        num_supervised=table[:, 2].astype(np.int32),
        row=table[:, 3].copy(),
        source=source,
    )
    digests = b"".join(hashlib.blake2b(example.tobytes(), digest_size=8).digest() for example in tokens)
    return Tokenised(chunk, np.frombuffer(digests, np.uint64), counts)


def _pieces(
    start: int, end: int, max_length: int, overflow: Overflow, counts: Counter[str]
) -> Iterable[tuple[int, int]]:
    if end - start <= max_length:
        return ((start, end),)
    if overflow == "truncate":
        counts["truncated"] += 1
        return ((start, start + max_length),)
    if overflow == "drop":
        counts["dropped_long"] += 1
        return ()
    counts["split"] += 1
    return [(first, min(first + max_length, end)) for first in range(start, end, max_length)]


def _trained(before: npt.NDArray[np.int64], first: int, last: int) -> int:
    """Supervised tokens of [first, last) that have a predecessor there; `before` counts those up to each token."""
    return int(before[last] - before[first + 1]) if last > first else 0
