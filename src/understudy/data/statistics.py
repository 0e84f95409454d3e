"""Counts taken while a set of examples is built, kept with it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from understudy.data.cutting import Tokenised

__all__ = ["SetStatistics"]

COUNTS = ("rows", "examples", "tokens", "supervised_tokens", "truncated", "split")
DROPPED = ("dropped_long", "dropped_unsupervised", "cut_to_prompt")
"""Left out: longer than `max_length` under `overflow: drop`; nothing to supervise; nothing left after cutting."""


class SetStatistics:
    """Counts over all sources, and for each."""

    def __init__(self) -> None:
        self._total: Counter[str] = Counter()
        self._sources: dict[int, Counter[str]] = {}
        self._formats: dict[int, str] = {}
        self._fingerprints: list[npt.NDArray[np.uint64]] = []
        self.max_token_id = -1

    def begin_source(self, number: int, format_name: str) -> None:
        self._sources[number] = Counter()
        self._formats[number] = format_name

    def add(self, tokenised: Tokenised) -> None:
        chunk = tokenised.chunk
        counts = tokenised.counts + Counter(
            examples=len(chunk.lengths),
            tokens=len(chunk.tokens),
            supervised_tokens=int(chunk.num_supervised.sum(dtype=np.int64)),
        )
        self._total.update(counts)
        self._sources[chunk.source].update(counts)
        self._fingerprints.append(tokenised.fingerprints)
        if len(chunk.tokens):
            self.max_token_id = max(self.max_token_id, int(chunk.tokens.max()))

    def __getitem__(self, count: str) -> int:
        return self._total[count]

    def as_json(self) -> dict[str, Any]:
        fingerprints = np.concatenate(self._fingerprints) if self._fingerprints else np.zeros(0, np.uint64)
        return {
            **_counts(self._total),
            "duplicates": len(fingerprints) - len(np.unique(fingerprints)),
            "max_token_id": self.max_token_id,
            "sources": [
                {"format": self._formats[number], **_counts(counts)} for number, counts in self._sources.items()
            ],
        }


def _counts(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in (*COUNTS, *DROPPED)}
