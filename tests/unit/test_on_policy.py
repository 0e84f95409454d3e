"""Steps with the student's own answers: which they are, and what they train on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny_data import cache_of
from understudy.contracts import IGNORED, GlobalBatch
from understudy.data.batching import TrainingData
from understudy.parallel.world import World
from understudy.recipe.objectives import OnPolicy
from understudy.training.on_policy import OnPolicyData, is_on_policy

pytestmark = pytest.mark.unit

ROWS = [([i, 10 + i, 20 + i, 30 + i, 40 + i][: 3 + i % 3], [0, 0, 1, 1, 1][: 3 + i % 3]) for i in range(6)]
"""Prompts of two tokens, answers of one to three."""


def echo(prompts: Sequence[Tensor], room: Sequence[int], seeds: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """As many tokens as there is room, which tell the prompt; but one where an example's id is odd."""
    return [[100 + int(prompt[0])] * (1 if seed[2] % 2 else most) for prompt, most, seed in zip(prompts, room, seeds)]


def student(tmp_path: Path, fraction: float, rank: int = 0, world_size: int = 1) -> OnPolicyData:
    cache = cache_of(tmp_path, ROWS)
    data = TrainingData(
        cache,
        seed=7,
        global_batch_size=4,
        micro_batch_tokens=8,
        epochs=2,
        max_steps=None,
        rank=rank,
        world_size=world_size,
    )
    world = World(rank, world_size, rank, world_size)
    return OnPolicyData(data, cache, echo, OnPolicy(max_new_tokens=4), fraction, 5, 7, 8, world)


def documents(*batches: GlobalBatch) -> list[tuple[list[int], list[int]]]:
    found = []
    for batch in batches:
        for micro_batch in batch.micro_batches:
            sizes = micro_batch.document_offsets.diff().tolist()
            pairs = zip(micro_batch.tokens.split(sizes), micro_batch.labels.split(sizes))
            found += [(tokens.tolist(), labels.tolist()) for tokens, labels in pairs if len(tokens) > 1]
    return sorted(found)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_the_fraction_is_that_of_any_number_of_steps(fraction: float) -> None:
    chosen = [is_on_policy(step, fraction) for step in range(1000)]
    for count in (10, 30, 100, 1000):
        assert sum(chosen[:count]) == round(fraction * count)


def test_the_student_answers_the_prompts_of_the_same_examples(tmp_path: Path) -> None:
    taught = student(tmp_path, 1.0)
    planned, batch = taught.data.step(0), taught.step(0)
    assert batch.examples == planned.examples
    assert batch.epoch == planned.epoch
    assert (planned.on_policy, batch.on_policy) == (False, True)
    expected = []
    for example in planned.examples:
        prompt = ROWS[example][0][:2]
        answer = [100 + example] * (1 if example % 2 else 3)  # five tokens in all at most
        labels = [IGNORED, *answer, IGNORED]
        expected.append(([*prompt, *answer], labels))
    assert documents(batch) == sorted(expected)
    assert batch.num_tokens == sum(1 if example % 2 else 3 for example in planned.examples)
    assert batch.num_input_tokens == batch.num_tokens + 2 * len(planned.examples)
    assert all(len(micro_batch.tokens) <= 8 for micro_batch in batch.micro_batches)


def test_other_steps_are_as_they_were(tmp_path: Path) -> None:
    mixed = student(tmp_path, 0.5)
    for step in range(4):
        assert mixed.known(step) == (step % 2 == 0)
        planned = mixed.data.step(step)
        assert (documents(mixed.step(step)) == documents(planned)) == mixed.known(step)


def test_ranks_share_out_what_one_process_has(tmp_path: Path) -> None:
    alone = student(tmp_path / "1", 1.0).step(1)
    shared = [student(tmp_path / f"3-{rank}", 1.0, rank, 3).step(1) for rank in range(3)]
    assert documents(*shared) == documents(alone)
    assert len({len(batch.micro_batches) for batch in shared}) == 1
    assert {batch.num_tokens for batch in shared} == {alone.num_tokens}


def test_an_answer_of_no_token_is_trained_on_as_nothing(tmp_path: Path) -> None:
    silent = student(tmp_path, 1.0)
    object.__setattr__(silent, "answers", lambda prompts, room, seeds: [[] for _ in prompts])
    batch = silent.step(0)
    assert batch.num_tokens == 1, "no division by zero"
    assert all(torch.all(micro_batch.labels == IGNORED) for micro_batch in batch.micro_batches)
