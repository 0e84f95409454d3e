"""What a cache keeps of a teacher's last hidden states.

Shape letters: N positions, n of a chunk, H hidden width, V classes, k kept ones, m draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from understudy.models.head import LossHead
from understudy.objectives.targets import DenseTargets
from understudy.objectives.teachers.cache_contents import (
    Contents,
    Hidden,
    HiddenRows,
    Rows,
    SampleRows,
    Samples,
    TopK,
    TopKRows,
)

__all__ = ["Kept", "keep"]

CHUNK_BYTES = 64 * 2**20
"""Of one chunk's fp32 logits."""


class Kept(NamedTuple):
    rows: Rows
    """On the CPU."""
    left_out: float
    """Nats, summed over positions: by how much forward KL is smaller with these than with the whole distribution, for a
    student that takes all classes that are not kept for equally likely. None is left out of draws, on average."""


def keep(contents: Contents, hidden: Tensor, head: LossHead, seeds: Sequence[tuple[int, int]]) -> Kept:
    """What `contents` keeps of `hidden` [N, H], through the teacher's `head`. `seeds` has, for each example in order,
    its number of positions and the seed of its draws, which so depend on nothing else."""
    if isinstance(contents, Hidden):
        return Kept(HiddenRows(hidden.cpu()), 0.0)
    log_probs = _log_probs(contents, hidden, head)
    if isinstance(contents, TopK):
        return _largest(contents, log_probs)
    return Kept(SampleRows(_drawn(contents, log_probs, seeds)), 0.0)


def _log_probs(contents: TopK | Samples, hidden: Tensor, head: LossHead) -> Iterator[Tensor]:
    """[n, V] fp32 a chunk, of the classes that the cache is about, at its temperature; one chunk at least."""
    dense = DenseTargets.through(hidden, head)
    size = max(1, CHUNK_BYTES // (4 * len(head.weight)))
    for start in range(0, max(1, len(hidden)), size):
        logits = dense.logits(slice(start, min(start + size, len(hidden))))
        yield torch.log_softmax(logits[:, : contents.vocabulary_size] / contents.temperature, dim=1)


def _largest(contents: TopK, chunks: Iterator[Tensor]) -> Kept:
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    left_out = 0.0
    for log_probs in chunks:
        values, ids = log_probs.topk(contents.k, dim=1)
        others = log_probs.scatter(1, ids, -torch.inf)
        tail = others.logsumexp(dim=1)
        count = log_probs.shape[1] - contents.k
        if count:
            # Σ p·log(p ÷ (tail ÷ count)) over the others.
            mass = others.exp()
            spread = torch.special.xlogy(mass, mass).sum() - (tail.exp() * (tail - torch.tensor(count).log())).sum()
            left_out += float(torch.nan_to_num(spread))
        parts.append((ids.cpu(), values.cpu(), tail.cpu()))
    ids, values, tails = (torch.cat(part) for part in zip(*parts))
    return Kept(TopKRows(ids, values, tails), left_out)


def _drawn(contents: Samples, chunks: Iterator[Tensor], seeds: Sequence[tuple[int, int]]) -> Tensor:
    probabilities = torch.cat([chunk.cpu().exp() for chunk in chunks])
    drawn, start = [probabilities.new_zeros(0, contents.m, dtype=torch.int64)], 0
    for count, seed in seeds:
        if count:
            generator = torch.Generator().manual_seed(seed)
            rows = probabilities[start : start + count]
            drawn.append(torch.multinomial(rows, contents.m, replacement=True, generator=generator))
        start += count
    return torch.cat(drawn)
