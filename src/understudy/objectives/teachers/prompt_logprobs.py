"""What a server is asked about one document, and what its answer says of each position.

The question is OpenAI's `/v1/completions` with vLLM's `prompt_logprobs`. The answer's `choices[0].prompt_logprobs` has
an entry a token: null for the first, else {token: {"logprob", "rank", …}} of the likeliest tokens in its place, given
those before it, and of the token itself where it is none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from understudy.objectives.targets import TopKTargets

__all__ = ["PATH", "question", "read_answer"]

PATH = "/completions"
SLACK = 1e-3
"""Rounding of a log-probability or a mass: servers may compute in half precision."""


def question(model: str, tokens: Sequence[int], k: int) -> dict[str, Any]:
    """The request's JSON. A server makes one token at least, which is ignored."""
    return {"model": model, "prompt": list(tokens), "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k}


def read_answer(answer: Any, length: int, positions: Sequence[int], k: int, classes: int) -> TopKTargets:
    """Of a prompt of `length` tokens, the `k` likeliest after each of `positions`, which is the entry of the token that
    comes next, among `classes`. The mass of all others is what is left of 1, −inf where that is nothing.

    Raises `ValueError`, saying what the server did, where it did not say all of that.
    """
    entries = _entries(answer)
    if len(entries) != length:
        raise ValueError(f"gave log-probabilities of {len(entries):,} tokens for a prompt of {length:,}")
    ids, log_probs = np.empty((len(positions), k), np.int64), np.empty((len(positions), k))
    for row, position in enumerate(positions):
        told_ids, told = _entry(entries[position + 1], k)
        largest = np.argsort(-told, kind="stable")[:k]
        ids[row], log_probs[row] = told_ids[largest], told[largest]
    if not bool(((ids >= 0) & (ids < classes)).all()):
        raise ValueError(f"gave a token beyond the teacher's {classes:,}: it serves another model")
    if not bool((np.isfinite(log_probs) & (log_probs <= SLACK)).all()):
        raise ValueError("gave a log-probability that is none")
    mass = np.exp(log_probs).sum(axis=1)
    if bool((mass > 1.0 + SLACK).any()):
        raise ValueError(f"gave probabilities that sum to {mass.max():.4g}")
    with np.errstate(divide="ignore"):
        tail = np.log1p(-np.minimum(mass, 1.0))
    return TopKTargets(torch.from_numpy(ids), torch.from_numpy(log_probs).float(), torch.from_numpy(tail).float())


def _entries(answer: Any) -> list[Any]:
    try:
        entries = answer["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        entries = None
    if not isinstance(entries, list):
        raise ValueError("gave no log-probabilities of the prompt (prompt_logprobs), as vLLM's server does")
    return entries


def _entry(entry: Any, k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens and their log-probabilities, at least `k`, in no order."""
    if not isinstance(entry, Mapping) or len(entry) < k:
        count = len(entry) if isinstance(entry, Mapping) else 0
        raise ValueError(f"gave log-probabilities of {count} tokens at a position where {k} were asked for")
    try:
        ids = np.fromiter(map(int, entry), np.int64, len(entry))
        told = np.fromiter((each["logprob"] for each in entry.values()), np.float64, len(entry))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError("gave log-probabilities in another form than vLLM's") from None
    return ids, told
