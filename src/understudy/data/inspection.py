"""What is in a token cache, for a person to look at. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from understudy.data.cache import TokenCache

__all__ = ["PERCENTILES", "Run", "describe", "runs"]

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that are all supervised, or all not."""

    tokens: Sequence[int]
    supervised: bool


def runs(cache: TokenCache, i: int) -> list[Run]:
    """Example `i` cut where supervision changes. Its first token never is: nothing predicts it."""
    tokens, flags = cache.tokens(i), cache.supervised(i).astype(np.bool_)
    flags[:1] = False
    edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(tokens)]
    return [
        Run(tokens[start:end].tolist(), bool(flags[start])) for start, end in itertools.pairwise(edges) if start < end
    ]


def describe(cache: TokenCache, paths: Sequence[str]) -> dict[str, Any]:
    """The set's statistics with its lengths' percentiles and the share of tokens that is supervised, as JSON.

    `paths` are the sources as the recipe names them; the cache knows contents only.
    """
    statistics = dict(cache.statistics)
    lengths = np.percentile(cache.lengths, PERCENTILES, method="higher").astype(int).tolist()
    return {
        **{name: value for name, value in statistics.items() if name not in ("max_token_id", "tokenizer_vocabulary")},
        "sources": [{"path": path, **source} for path, source in zip(paths, statistics["sources"])],
        "supervised_share": statistics["supervised_tokens"] / statistics["tokens"],
        "mean_length": float(cache.lengths.mean()),
        "length_percentiles": dict(zip(map(str, PERCENTILES), lengths)),
    }
