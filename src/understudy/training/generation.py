"""Greedy answers to evaluation prompts while a model is sharded over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from understudy.contracts import IGNORED, Batch, Strategy

__all__ = ["greedy_answers"]


@dataclass
class _Growing:
    """A prompt and what has been answered so far."""

    index: int
    tokens: Tensor
    room: int
    """Tokens that may still be added."""
    answer: list[int] = field(default_factory=list)

    def add(self, token: int, stops: frozenset[int]) -> None:
        self.answer.append(token)
        self.tokens = torch.cat([self.tokens, torch.tensor([token])])
        self.room = 0 if token in stops else self.room - 1


def greedy_answers(
    strategy: Strategy,
    prompts: Sequence[Tensor],
    room: Sequence[int],
    *,
    stops: frozenset[int],
    micro_batch_tokens: int,
    rank: int,
    world_size: int,
) -> list[list[int]]:
    """The likeliest continuation of each prompt ([·] int64), at most `room` tokens, its stop token included; on every
    rank, in order.

    A collective: each round, every rank runs the model once on as many of its unfinished prompts as
    `micro_batch_tokens` holds, an empty micro-batch if it has none, until no rank has any. Nothing is cached between
    rounds: a key-value cache would have to know every strategy's layout, and evaluation answers are short.
    """
    mine = [_Growing(i, prompts[i], room[i]) for i in range(rank, len(prompts), world_size)]
    waiting = [grown for grown in mine if grown.room > 0]
    while _any_rank(bool(waiting), world_size):
        active = _fitting(waiting, micro_batch_tokens)
        batch = Batch.of([(grown.tokens, torch.full_like(grown.tokens, IGNORED)) for grown in active])
        chosen = strategy.logits(batch, at=batch.document_offsets[1:].long() - 1).argmax(dim=-1).tolist()
        for grown, token in zip(active, chosen):
            grown.add(token, stops)
        waiting = [grown for grown in waiting if grown.room > 0]
    return _gathered(mine, len(prompts), max(room, default=0), world_size)


def _fitting(waiting: Sequence[_Growing], capacity: int) -> list[_Growing]:
    """The first of them that hold at most `capacity` tokens together; at least one where there is one."""
    count, total = 0, 0
    for grown in waiting:
        total += len(grown.tokens)
        if count and total > capacity:
            break
        count += 1
    return list(waiting[:count])


def _any_rank(mine: bool, world_size: int) -> bool:
    """Whether it is true on some rank."""
    flag = torch.tensor(mine, dtype=torch.int64)
    if world_size > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _gathered(mine: Sequence[_Growing], count: int, most: int, world_size: int) -> list[list[int]]:
    """Every rank's answers, on every rank."""
    nothing = -1
    table = torch.full((count, most), nothing)
    for grown in mine:
        table[grown.index, : len(grown.answer)] = torch.tensor(grown.answer, dtype=torch.int64)
    if world_size > 1:
        dist.all_reduce(table, dist.ReduceOp.MAX)
    return [[token for token in row if token != nothing] for row in table.tolist()]
