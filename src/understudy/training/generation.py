"""Answers to prompts while a model is sharded over ranks: the likeliest ones, or sampled ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from understudy.contracts import Strategy
from understudy.models.decoding import Decoding

__all__ = ["Chance", "draw_tokens", "generate"]


@dataclass(frozen=True)
class Chance:
    """How tokens are drawn. The same numbers come for the same seed, whoever draws them and beside whatever else."""

    temperature: float
    top_p: float
    """Draw from the likeliest tokens whose probabilities sum to this."""
    seeds: Sequence[tuple[int, ...]]
    """One a prompt."""


@dataclass
class _Growing:
    """A prompt and what has been answered so far."""

    index: int
    prompt: Tensor
    room: int
    """Tokens that may still be added."""
    draws: Tensor | None
    """[room] fp64 uniform numbers; None to take the likeliest token."""
    answer: list[int]

    @property
    def size(self) -> int:
        return len(self.prompt) + self.room

    @property
    def draw(self) -> Tensor:
        """For the next token; behind the last one, any number."""
        assert self.draws is not None, "tokens are drawn"
        return self.draws[min(len(self.answer), len(self.draws) - 1)]

    def add(self, token: int, stops: frozenset[int]) -> None:
        if self.room:
            self.answer.append(token)
            self.room = 0 if token in stops else self.room - 1


def generate(
    strategy: Strategy,
    prompts: Sequence[Tensor],
    room: Sequence[int],
    *,
    stops: frozenset[int],
    micro_batch_tokens: int,
    rank: int,
    world_size: int,
    chance: Chance | None = None,
    mark: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """A continuation of each prompt ([·] int64), at most `room` tokens, its stop token included; on every rank, in
    order. The likeliest one without `chance`.

    A collective: ranks share the prompts out, and run their batches in step, with a batch of no meaning where one has
    none, until no rank has a text that goes on. A batch holds at most `micro_batch_tokens` tokens, or one text. `mark`
    is called before each token.
    """
    growing = [_Growing(i, prompts[i], room[i], _draws(chance, i, room[i]), []) for i in range(len(prompts))]
    # By size, so that a batch has little padding, and every rank as many long ones as any other.
    by_size = sorted(filter(lambda each: each.room, growing), key=lambda each: (-each.size, each.index))
    mine = by_size[rank::world_size]
    batches = list(_batches(mine, micro_batch_tokens))
    for number in range(_largest(len(batches), world_size)):
        members = batches[number] if number < len(batches) else []
        _grow(strategy, members, chance, stops, world_size, mark)
    return _gathered(mine, len(prompts), max(room, default=0), world_size)


def _grow(
    strategy: Strategy,
    members: Sequence[_Growing],
    chance: Chance | None,
    stops: frozenset[int],
    world_size: int,
    mark: Callable[[], None],
) -> None:
    texts = Decoding([each.prompt for each in members] or [torch.zeros(1, dtype=torch.int64)])
    while _largest(int(any(each.room for each in members)), world_size):
        mark()
        logits = strategy.decode(texts)
        if chance is None or not members:
            chosen = logits.argmax(dim=1)
        else:
            draws = torch.stack([each.draw for each in members])
            chosen = draw_tokens(logits, chance.temperature, chance.top_p, draws)
        for each, token in zip(members, chosen.tolist()):
            each.add(token, stops)
        texts.feed(chosen, torch.tensor([each.room > 0 for each in members] or [False]))


def draw_tokens(logits: Tensor, temperature: float, top_p: float, draws: Tensor) -> Tensor:
    """[B] int64: a token of each row of `logits` [B, V], from the likeliest of mass `top_p`: that where the number in
    `draws` [B], between 0 and 1, falls among these as they stand in falling order."""
    probabilities, order = torch.softmax(logits.double() / temperature, dim=1).sort(dim=1, descending=True, stable=True)
    mass = probabilities.cumsum(dim=1)
    # The first of which the mass is enough belongs to them.
    kept = (mass < top_p).sum(dim=1, keepdim=True).clamp(max=mass.shape[1] - 1)
    reached = draws.to(mass).unsqueeze(1) * mass.gather(1, kept)
    place = torch.minimum(torch.searchsorted(mass, reached, right=True), kept)
    return order.gather(1, place).squeeze(1)


def _draws(chance: Chance | None, index: int, count: int) -> Tensor | None:
    if chance is None:
        return None
    return torch.from_numpy(np.random.default_rng(chance.seeds[index]).random(max(1, count)))


def _batches(growing: Sequence[_Growing], capacity: int) -> Iterator[list[_Growing]]:
    batch: list[_Growing] = []
    for each in growing:
        members = [*batch, each]
        width = max(len(other.prompt) for other in members) + max(other.room for other in members)
        if batch and width * len(members) > capacity:
            yield batch
            members = [each]
        batch = members
    if batch:
        yield batch


def _largest(mine: int, world_size: int) -> int:
    """Over all ranks."""
    number = torch.tensor(mine, dtype=torch.int64)
    if world_size > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def _gathered(mine: Sequence[_Growing], count: int, most: int, world_size: int) -> list[list[int]]:
    """Every rank's answers, on every rank."""
    nothing = -1
    table = torch.full((count, most), nothing)
    for grown in mine:
        table[grown.index, : len(grown.answer)] = torch.tensor(grown.answer, dtype=torch.int64)
    if world_size > 1:
        dist.all_reduce(table, dist.ReduceOp.MAX)
    return [[token for token in row if token != nothing] for row in table.tolist()]
