"""What each optimizer step trains on: global batches of examples (P3), a pure function of recipe and step (P1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from understudy.contracts import IGNORED, Batch, GlobalBatch
from understudy.data.binning import bin_examples, consecutive_bins
from understudy.data.cache import TokenCache
from understudy.data.order import EpochOrder

__all__ = ["DEFAULT_ATTENTION_COST", "TrainingData", "evaluation_batches", "prompt_and_answer"]

DEFAULT_ATTENTION_COST = 1 / (12 * 2048)
"""Cost of a squared token relative to a token: causal attention over a decoder layer's matrices is about 1 / (12 ·
hidden width); this is it for a width of 2,048."""


class TrainingData:
    """The training set as steps. Holds no state: `step(i)` may be asked in any order, on any rank, at any time."""

    def __init__(
        self,
        cache: TokenCache,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_tokens: int,
        epochs: float,
        max_steps: int | None,
        rank: int,
        world_size: int,
        weights: Sequence[float] | None = None,
        attention_cost: float = DEFAULT_ATTENTION_COST,
    ) -> None:
        """`weights` gives one weight a source, in the recipe's order (all 1 when left out). `world_size` counts
        data-parallel ranks. No example may be longer than `micro_batch_tokens` (a rule refuses such a recipe)."""
        self._cache = cache
        self._order = EpochOrder(cache.source, weights, seed=seed)
        self._batch_size = global_batch_size
        self._capacity = micro_batch_tokens
        self._rank = rank
        self._world_size = world_size
        self.attention_cost = attention_cost
        self.examples_per_epoch = self._order.length
        self.steps_per_epoch = max(1, math.ceil(self._order.length / global_batch_size))
        # 0.1 + 0.2 epochs of 10 steps are 3 steps, not 4.
        by_epochs = max(1, math.ceil(epochs * self.steps_per_epoch - 1e-6))
        self.total_steps = by_epochs if max_steps is None else max_steps

    def examples(self, step: int) -> npt.NDArray[np.int64]:
        """Ids of the examples of step `step` (from 0), in order; the last step of an epoch may have fewer."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._order.epoch(epoch)[within * self._batch_size : (within + 1) * self._batch_size]

    def step(self, step: int) -> GlobalBatch:
        """The global batch of step `step` (from 0), with this rank's micro-batches. No collective."""
        examples = self.examples(step)
        rows = self._rows(examples)
        return GlobalBatch(
            micro_batches=tuple(_join(self._cache, examples[row[self._rank]]) for row in rows),
            num_tokens=int(self._cache.num_supervised[examples].sum(dtype=np.int64)),
            num_input_tokens=int(self._cache.lengths[examples].sum(dtype=np.int64)),
            examples=tuple(examples.tolist()),
            epoch=(step + 1) / self.steps_per_epoch,
        )

    def largest(self, step: int) -> tuple[int, int]:
        """Tokens of the largest micro-batch of step `step` (from 0) on any rank, and how many a rank has."""
        examples = self.examples(step)
        rows, lengths = self._rows(examples), self._cache.lengths[examples]
        return max(int(lengths[members].sum(dtype=np.int64)) for row in rows for members in row), len(rows)

    def _rows(self, examples: npt.NDArray[np.int64]) -> list[list[list[int]]]:
        return bin_examples(
            self._cache.lengths[examples],
            capacity=self._capacity,
            world_size=self._world_size,
            attention_cost=self.attention_cost,
        )


def evaluation_batches(
    cache: TokenCache, *, micro_batch_tokens: int, rank: int, world_size: int, max_batches: int | None
) -> tuple[Batch, ...]:
    """This rank's evaluation micro-batches, equal in number on every rank, some possibly empty. No collective.

    The micro-batches are cut once, in the set's order, and dealt out in turn: together they are the same at any world
    size (with `max_batches`, the first `max_batches · world_size` of them).
    """
    bins = consecutive_bins(cache.lengths, capacity=micro_batch_tokens)
    if max_batches is not None:
        bins = bins[: max_batches * world_size]
    count = math.ceil(len(bins) / world_size)
    mine = bins[rank::world_size]
    mine += [[]] * (count - len(mine))
    return tuple(_join(cache, np.asarray(members, dtype=np.int64)) for members in mine)


def prompt_and_answer(cache: TokenCache, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Example `i` cut for generation: tokens before its last supervised span, and that span; both [·] int64.

    Where the span starts the example (text, or `train_on_prompt`) its first token is the prompt.
    """
    tokens = torch.from_numpy(cache.tokens(i).astype(np.int64))
    flags = cache.supervised(i).astype(np.int8)
    ends = np.flatnonzero(np.diff(flags, append=0) == -1) + 1
    if not len(ends):
        return tokens, tokens[:0]
    end = int(ends[-1])
    unsupervised = np.flatnonzero(flags[:end] == 0)
    start = int(unsupervised[-1]) + 1 if len(unsupervised) else 1
    return tokens[:start], tokens[start:end]


def _join(cache: TokenCache, examples: npt.NDArray[np.int64]) -> Batch:
    """`Batch.of` the examples' documents, without a Python step for each."""
    if not len(examples):
        return Batch.of([])
    tokens, supervised = cache.gather(examples)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(cache.lengths[examples], dtype=np.int64)])
    predicted = supervised[1:].copy()
    predicted[offsets[1:-1] - 1] = False  # a document's first token is nobody's successor
    labels = np.full(len(tokens), IGNORED, np.int64)
    labels[:-1][predicted] = tokens[1:][predicted]
    positions = np.arange(len(tokens)) - np.repeat(offsets[:-1], cache.lengths[examples])
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        document_offsets=torch.from_numpy(offsets.astype(np.int32)),
    )
