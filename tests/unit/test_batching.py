"""Global batches: every example once, the same at any world size, bins within capacity, labels shifted."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_data import cache_of
from understudy.contracts import IGNORED, Batch
from understudy.data.batching import TrainingData, evaluation_batches, prompt_and_answer
from understudy.data.binning import bin_examples
from understudy.data.cache import TokenCache
from understudy.data.order import EpochOrder, hash64

pytestmark = pytest.mark.unit

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=40)


def make_cache(lengths: list[int]) -> TokenCache:
    """Tokens count up over the whole set, so that a token tells its example; every third is not supervised."""
    examples, token = [], 0
    for length in lengths:
        tokens = list(range(token, token + length))
        examples.append((tokens, [int(value % 3 > 0) for value in tokens]))
        token += length
    with tempfile.TemporaryDirectory() as root:
        return cache_of(Path(root), examples)  # the mapped file outlives its name


def training(cache: TokenCache, rank: int = 0, world_size: int = 1, **options: object) -> TrainingData:
    given = {"seed": 7, "global_batch_size": 5, "micro_batch_tokens": 64, "epochs": 2, "max_steps": None, **options}
    return TrainingData(cache, rank=rank, world_size=world_size, **given)  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None)
@given(LENGTHS)
def test_every_example_is_trained_on_exactly_once_an_epoch(lengths: list[int]) -> None:
    data = training(make_cache(lengths))
    assert data.total_steps == 2 * data.steps_per_epoch
    for epoch in range(2):
        steps = range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch)
        seen = [example for step in steps for example in data.step(step).examples]
        assert sorted(seen) == list(range(len(lengths)))


@settings(max_examples=15, deadline=None)
@given(LENGTHS, st.integers(0, 3))
def test_the_global_batch_is_the_same_at_any_world_size(lengths: list[int], step: int) -> None:
    cache = make_cache(lengths)
    alone = training(cache).step(step)
    expected = sorted(
        pair for batch in alone.micro_batches for pair in zip(batch.tokens.tolist(), batch.labels.tolist())
    )
    for world_size in (2, 3, 4):
        parts = [training(cache, rank, world_size).step(step) for rank in range(world_size)]
        assert {part.examples for part in parts} == {alone.examples}
        assert {(part.num_tokens, part.num_input_tokens, part.epoch) for part in parts} == {
            (alone.num_tokens, alone.num_input_tokens, alone.epoch)
        }
        assert len({len(part.micro_batches) for part in parts}) == 1
        batches = [batch for part in parts for batch in part.micro_batches]
        assert all(len(batch.tokens) <= 64 for batch in batches)
        documents = [batch for batch in batches if not is_empty(batch)]
        found = [pair for batch in documents for pair in zip(batch.tokens.tolist(), batch.labels.tolist())]
        assert sorted(found) == expected
        assert sum(int((batch.labels != IGNORED).sum()) for batch in batches) == alone.num_tokens


def is_empty(batch: Batch) -> bool:
    return len(batch.tokens) == 1


@settings(max_examples=15, deadline=None)
@given(LENGTHS)
def test_a_micro_batch_is_its_documents_end_to_end(lengths: list[int]) -> None:
    cache = make_cache(lengths)
    data = training(cache, global_batch_size=len(lengths), micro_batch_tokens=10_000)
    made = data.step(0)
    (batch,) = made.micro_batches
    expected = Batch.of([cache.document(i) for i in made.examples])
    for name in ("tokens", "labels", "positions", "document_offsets"):
        assert torch.equal(getattr(batch, name), getattr(expected, name))
        assert getattr(batch, name).dtype == getattr(expected, name).dtype


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 4))
def test_bins_hold_every_example_once_within_capacity(lengths: list[int], world_size: int) -> None:
    rows = bin_examples(np.array(lengths, np.int32), capacity=100, world_size=world_size, attention_cost=0.01)
    assert all(len(row) == world_size for row in rows)
    bins = [members for row in rows for members in row]
    assert sorted(example for members in bins for example in members) == list(range(len(lengths)))
    assert all(sum(lengths[example] for example in members) <= 100 for members in bins)


def test_the_largest_micro_batch_of_a_step_is_known_without_its_tokens() -> None:
    cache = make_cache([40, 3, 7, 30, 12, 25, 9])
    ranks = [training(cache, rank, 2) for rank in range(2)]
    for step in range(ranks[0].total_steps):
        batches = [data.step(step).micro_batches for data in ranks]
        largest = max(len(batch.tokens) for mine in batches for batch in mine)
        assert all(data.largest(step) == (largest, len(batches[0])) for data in ranks)


def test_ranks_get_like_costs() -> None:
    lengths = np.array([100, 100, 90, 90, 30, 30, 20, 20, 10, 10], np.int32)
    (row,) = bin_examples(lengths, capacity=1000, world_size=2, attention_cost=0.0)
    assert [int(lengths[members].sum()) for members in row] == [250, 250]


def test_a_label_is_the_next_token_of_the_same_document(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, [([5, 6, 7, 8], [1, 0, 1, 1]), ([1, 2], [1, 1])])
    tokens, labels = cache.document(0)
    assert tokens.tolist() == [5, 6, 7, 8]
    assert labels.tolist() == [IGNORED, 7, 8, IGNORED]
    assert cache.num_supervised.tolist() == [2, 1]


def test_whole_weights_repeat_examples_and_fractions_take_turns() -> None:
    source = np.array([0] * 10 + [1] * 10)
    order = EpochOrder(source, [2.0, 0.5], seed=3)
    first, second = (Counter(order.epoch(epoch).tolist()) for epoch in range(2))
    assert all(first[i] == second[i] == 2 for i in range(10))
    taken = [{i for i in range(10, 20) if epoch[i]} for epoch in (first, second)]
    assert len(taken[0]) == len(taken[1]) == 5
    assert taken[0] | taken[1] == set(range(10, 20))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    source = np.zeros(50, np.int32)
    one, same, other = (EpochOrder(source, None, seed=seed) for seed in (1, 1, 2))
    assert one.epoch(3).tolist() == same.epoch(3).tolist()
    assert one.epoch(3).tolist() != one.epoch(4).tolist()
    assert one.epoch(3).tolist() != other.epoch(3).tolist()


def test_the_hash_is_splitmix64_and_never_changes() -> None:
    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    assert mix(0) == 0xE220A8397B1DCDAF  # the published generator's first output from seed 0
    state = mix(mix(0 ^ 11) ^ 12)
    assert hash64(np.arange(3), 11, 12).tolist() == [mix(mix(value) ^ state) for value in range(3)]


def test_the_last_partial_batch_is_trained_on_and_batches_do_not_cross_epochs() -> None:
    data = training(make_cache([4] * 7), epochs=1.5)
    assert [len(data.step(step).examples) for step in range(4)] == [5, 2, 5, 2]
    assert data.total_steps == 3
    assert [data.step(step).epoch for step in range(3)] == [0.5, 1.0, 1.5]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_covers_every_example_once_at_any_world_size(world_size: int) -> None:
    cache = make_cache([10, 20, 30, 5, 60, 7, 8])
    parts = [
        evaluation_batches(cache, micro_batch_tokens=64, rank=rank, world_size=world_size, max_batches=None)
        for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1
    tokens = [token for part in parts for batch in part if not is_empty(batch) for token in batch.tokens.tolist()]
    assert sorted(tokens) == list(range(140))


def test_evaluation_stops_at_max_batches() -> None:
    batches = evaluation_batches(make_cache([40] * 9), micro_batch_tokens=64, rank=1, world_size=2, max_batches=2)
    assert [int(batch.tokens[0]) for batch in batches] == [40, 120]


def test_the_answer_is_the_last_supervised_span(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, [([1, 2, 3, 4, 5, 6, 7], [0, 1, 0, 0, 1, 1, 0]), ([1, 2, 3], [1, 1, 1])])
    prompt, answer = prompt_and_answer(cache, 0)
    assert (prompt.tolist(), answer.tolist()) == ([1, 2, 3, 4], [5, 6])
    prompt, answer = prompt_and_answer(cache, 1)
    assert (prompt.tolist(), answer.tolist()) == ([1], [2, 3])
