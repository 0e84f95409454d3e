"""The teacher cache: exact or closely bounded, the same bytes whoever builds it and however often it is killed."""

from __future__ import annotations

import multiprocessing
import subprocess
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from tests.crash_states import tracing
from understudy.errors import UserError
from understudy.objectives.teachers import cache_format
from understudy.objectives.teachers.cache_contents import (
    LOG_PROB_ERROR,
    Contents,
    Hidden,
    HiddenRows,
    Rows,
    SampleRows,
    Samples,
    TopK,
    TopKRows,
)
from understudy.objectives.teachers.cache_format import (
    MARKER,
    CacheDescription,
    example_key,
    example_keys,
    shard_name,
)
from understudy.objectives.teachers.cache_reader import DamagedCacheError, TeacherCache
from understudy.objectives.teachers.cache_writer import BuiltSize, CacheWriter, building

pytestmark = pytest.mark.unit

VOCABULARIES = [100, 65_536, 65_537, 128_256, 2**24]
Example = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_format, "EXAMPLES_PER_SHARD", (4, 4))


def described(contents: Contents, teacher: str = "teacher", tokenizer: str = "tokenizer") -> CacheDescription:
    return CacheDescription(teacher, tokenizer, contents)


def examples_of(count: int, seed: int = 0) -> list[Example]:
    """Distinct examples with none to all of their positions supervised."""
    generator = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        tokens = generator.integers(0, 100, generator.integers(2, 9)).astype(np.int32)
        tokens[:2] = divmod(number + 1000 * seed, 100)
        examples.append((tokens, generator.random(len(tokens)) < 0.6))
    return examples


def said_about(example: Example, contents: Contents) -> Rows:
    """What a made-up teacher says, a function of the example alone."""
    generator = np.random.default_rng(list(example_key(*example)))
    rows = int(np.count_nonzero(example[1]))
    if isinstance(contents, Hidden):
        dtype = contents.layout()["hidden"].dtype
        hidden = generator.standard_normal((rows, contents.hidden_size), np.float32)
        return HiddenRows(torch.from_numpy(hidden).to(dtype))
    if isinstance(contents, Samples):
        return SampleRows(torch.from_numpy(generator.integers(0, contents.vocabulary_size, (rows, contents.m))))
    ids = torch.from_numpy(generator.integers(0, contents.vocabulary_size, (rows, contents.k)))
    logits = torch.from_numpy(generator.standard_normal((rows, contents.k + 1), np.float32)) * 3
    log_probs = torch.log_softmax(logits, dim=1)
    return TopKRows(ids, log_probs[:, 1:].sort(dim=1, descending=True).values, log_probs[:, 0])


def joined(parts: Sequence[Rows]) -> Rows:
    return type(parts[0])(*(torch.cat(tensors) for tensors in zip(*parts)))


def writers(
    directory: Path, description: CacheDescription, examples: Sequence[Example], world_size: int = 1
) -> list[CacheWriter]:
    keys = example_keys(examples)
    return [CacheWriter(directory, description, rank, world_size, keys) for rank in range(world_size)]


def build(
    directory: Path, description: CacheDescription, examples: Sequence[Example], world_size: int = 1
) -> BuiltSize:
    ranks = writers(directory, description, examples, world_size)
    for writer in reversed(ranks):
        for shard in writer.pending():
            rows = [said_about(examples[i], description.contents) for i in writer.examples(shard)]
            writer.write(shard, joined(rows))
    return ranks[0].commit()


def contents_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def assert_same(found: Rows, expected: Rows) -> None:
    assert type(found) is type(expected)
    for name, tensor, wanted in zip(found._fields, found, expected):
        assert (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype)
        if name in ("log_probs", "tail"):
            torch.testing.assert_close(tensor, wanted, atol=LOG_PROB_ERROR, rtol=1e-6)
        else:
            assert torch.equal(tensor, wanted)


KINDS: dict[str, Callable[[int], Contents]] = {
    "top_k": lambda vocabulary: TopK(5, 2.0, vocabulary),
    "samples": lambda vocabulary: Samples(12, 1.0, 7, vocabulary),
    "hidden bf16": lambda vocabulary: Hidden(6, "bf16"),
    "hidden fp32": lambda vocabulary: Hidden(6, "fp32"),
}


@pytest.mark.parametrize("vocabulary", [100, 65_536, 128_256])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_teacher_said_comes_back_for_each_example(tmp_path: Path, kind: str, vocabulary: int) -> None:
    description = described(KINDS[kind](vocabulary))
    examples = examples_of(40)
    build(tmp_path, description, examples)
    cache = TeacherCache.open(tmp_path, description)
    assert len(cache) == len(examples)
    assert sum(not supervised.any() for _, supervised in examples) > 0
    for example in examples:
        assert_same(cache.targets(*example), said_about(example, description.contents))
    # As a batch's documents come: torch tensors, in any order, again and again.
    asked = [examples[i] for i in (7, 3, 3, 39, 0)]
    tensors = [(torch.from_numpy(tokens).long(), torch.from_numpy(mask)) for tokens, mask in asked]
    assert_same(cache.batch_targets(tensors), joined([said_about(example, description.contents) for example in asked]))
    nothing = cache.batch_targets([])
    assert_same(cache.targets(torch.zeros(1).long(), torch.zeros(1).bool()), nothing)  # an empty micro-batch
    assert [tensor.shape[0] for tensor in nothing] == [0] * len(nothing)
    assert [tensor.shape[1:] for tensor in nothing] == [tensor.shape[1:] for tensor in cache.batch_targets(tensors)]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(VOCABULARIES), st.integers(0, 5), st.integers(1, 20), st.integers(0, 2**32 - 1), st.integers(0, 3)
)
def test_every_id_survives_packing(vocabulary: int, rows: int, count: int, seed: int, edges: int) -> None:
    ids = np.random.default_rng(seed).integers(0, vocabulary, (rows, count))
    ids[:, :edges] = vocabulary - 1
    samples = Samples(count, 1.0, 0, vocabulary)
    stored = samples.encode(SampleRows(torch.from_numpy(ids)))
    assert {name: (tuple(t.shape[1:]), t.dtype) for name, t in stored.items()} == samples.layout()
    assert torch.equal(samples.decode(stored).ids, torch.from_numpy(ids))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-63.9, -1e-6), min_size=4, max_size=4), st.booleans())
def test_log_probabilities_come_back_within_half_a_step(values: list[float], without_tail: bool) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    logits = torch.cat([logits, torch.full((1, 1), -torch.inf if without_tail else -1.0).double()], dim=1)
    exact = torch.log_softmax(logits, dim=1)
    contents = TopK(4, 1.0, 100)
    stored = contents.encode(TopKRows(torch.tensor([[3, 1, 2, 0]]), exact[:, :4].float(), exact[:, 4].float()))
    found = contents.decode(stored)
    above = exact[0, :4] > -63.99
    assert (found.log_probs[0].double() - exact[0, :4])[above].abs().max() <= LOG_PROB_ERROR + 1e-5
    assert bool((found.log_probs[0, ~above] <= -63.9).all())
    if without_tail:
        assert found.tail.item() == -torch.inf
    else:
        assert abs(found.tail.item() - exact[0, 4].item()) <= LOG_PROB_ERROR + 1e-5


def test_probabilities_of_zero_stay_zero_and_tiny_ones_stay_above_it() -> None:
    contents = TopK(3, 1.0, 100)
    given_rows = TopKRows(
        torch.tensor([[5, 4, 3]]), torch.tensor([[0.0, -500.0, -torch.inf]]), torch.tensor([-torch.inf])
    )
    found = contents.decode(contents.encode(given_rows))
    assert found.log_probs.tolist() == [[0.0, -65534 / 1024, -torch.inf]]
    assert found.tail.tolist() == [-torch.inf]


@pytest.mark.parametrize(("vocabulary", "exponent"), [(49_152, 1.0), (128_256, 1.1), (128_256, 2.5)])
def test_rounding_adds_less_than_a_millionth_of_a_nat_to_the_divergence(vocabulary: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(3)
    ranks = torch.arange(1, vocabulary + 1, dtype=torch.float64)
    logits = -exponent * ranks.log() + torch.randn(32, vocabulary, generator=generator, dtype=torch.float64)
    exact = torch.log_softmax(logits, dim=1)
    kept = exact.topk(64, dim=1)
    tail = exact.scatter(1, kept.indices, -torch.inf).logsumexp(dim=1)
    contents = TopK(64, 1.0, vocabulary)
    found = contents.decode(contents.encode(TopKRows(kept.indices, kept.values.float(), tail.float())))
    assert torch.equal(found.ids, kept.indices)

    def buckets(log_probs: Tensor, rest: Tensor) -> Tensor:
        return torch.log_softmax(torch.cat([log_probs.double(), rest.double().unsqueeze(1)], dim=1), dim=1)

    p, q = buckets(kept.values, tail), buckets(found.log_probs, found.tail)
    divergence = (p.exp() * (p - q)).sum(dim=1)
    assert divergence.max() < LOG_PROB_ERROR**2  # second order: ½ Var(error) ≤ ½ LOG_PROB_ERROR²
    mass = torch.cat([found.log_probs, found.tail.unsqueeze(1)], dim=1).double().logsumexp(dim=1)
    assert mass.abs().max() <= LOG_PROB_ERROR + 1e-6


@pytest.mark.parametrize(
    ("contents", "num_bytes"),
    [
        (TopK(64, 1.0, 49_152), 2 * 64 + 2 * 64 + 2),
        (TopK(64, 1.0, 128_256), 64 * 17 // 8 + 2 * 64 + 2),
        (Samples(12, 1.0, 0, 128_256), 26),
        (Hidden(576, "bf16"), 1152),
    ],
)
def test_a_token_takes_as_many_bytes_as_announced(tmp_path: Path, contents: Contents, num_bytes: int) -> None:
    description = described(contents)
    assert description.bytes_per_token == num_bytes
    tokens = np.arange(300, dtype=np.int32)
    examples = [(tokens + n, np.ones(300, np.bool_)) for n in range(20)]
    size = build(tmp_path, description, examples)
    on_disk = sum(len(content) for name, content in contents_of(tmp_path).items() if name.endswith(".safetensors"))
    assert (size.examples, size.tokens, size.num_bytes) == (20, 6000, on_disk)
    assert num_bytes < size.bytes_per_token < num_bytes + 1


def test_the_key_tells_tokens_and_masks_apart_and_nothing_else() -> None:
    tokens, mask = [1, 2, 3], [0, 1, 1]
    keys = {
        example_key(np.array(ids), np.array(flags))
        for ids, flags in [(tokens, mask), ([1, 2], [0, 1]), ([1, 2, 4], mask), (tokens, [1, 0, 1]), ([], [])]
    }
    assert len(keys) == 5
    assert example_key(torch.tensor(tokens), torch.tensor(mask).bool()) == example_key(
        np.array(tokens, np.int32), np.array(mask, np.uint8)
    )
    with pytest.raises(ValueError, match="one example"):
        example_key(np.array(tokens), np.array([True]))


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_depend_neither_on_the_number_of_writers_nor_on_the_order(tmp_path: Path, kind: str) -> None:
    description = described(KINDS[kind](128_256))
    examples = examples_of(30)
    build(tmp_path / "one", description, examples)
    build(tmp_path / "three", description, [*examples[::-1], examples[4], examples[9]], world_size=3)
    assert contents_of(tmp_path / "one") == contents_of(tmp_path / "three")
    assert len(list((tmp_path / "one").rglob("shard-*.safetensors"))) == 8


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("there_already", [0, 5])
def test_a_build_that_was_killed_anywhere_ends_in_the_same_bytes(tmp_path: Path, there_already: int) -> None:
    description = described(TopK(3, 1.0, 128_256))
    examples = examples_of(10 + there_already)
    said = joined([said_about(example, description.contents) for example in examples])
    work = tmp_path / "work"
    work.mkdir()
    if there_already:
        build(work / "cache", description, examples[:there_already])
    with tracing(work, vouching=MARKER) as tracer:
        build(work / "cache", description, examples)
    whole = contents_of(work / "cache")
    assert {state.case.split(",")[0] for state in tracer.states} == {"killed", "power cut"}
    unfinished = 0
    for number, state in enumerate(tracer.states):
        left = tmp_path / f"left-{number}"
        state.write(left)
        try:
            assert_same(TeacherCache.open(left / "cache").batch_targets(examples), said)
        except DamagedCacheError as error:
            raise AssertionError(str(state)) from error
        except UserError:  # absent, unfinished or without those examples; never half of them
            unfinished += 1
        build(left / "cache", description, examples, world_size=2)
        assert contents_of(left / "cache") == whole, str(state)
    assert unfinished > 20


@pytest.mark.usefixtures("small_shards")
def test_a_killed_build_goes_on_with_the_shards_that_are_missing_or_damaged(tmp_path: Path) -> None:
    description = described(TopK(3, 1.0, 100))
    examples = examples_of(22)
    (writer,) = writers(tmp_path, description, examples)
    shards = list(writer.pending())
    assert shards == [0, 1, 2, 3, 4, 5]
    for shard in shards[:4]:
        writer.write(shard, joined([said_about(examples[i], description.contents) for i in writer.examples(shard)]))
    with pytest.raises(UserError, match=r"shard-0000[45]\.safetensors: was not written"):
        writer.commit()
    with pytest.raises(UserError, match=r"never finished; `understudy teacher cache RECIPE` goes on"):
        TeacherCache.open(tmp_path)
    (part,) = tmp_path.glob("part-*")
    damage(part / shard_name(1))
    (part / shard_name(2)).write_bytes((part / shard_name(2)).read_bytes()[:100])
    first, second = writers(tmp_path, description, examples, world_size=2)
    assert (list(first.pending()), list(second.pending())) == ([2, 4], [1, 5])
    build(tmp_path, description, examples)
    TeacherCache.open(tmp_path).verify()


def damage(path: Path) -> None:
    """Flips the last bit."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.usefixtures("small_shards")
def test_a_corrupt_shard_is_refused_by_name_and_built_again_once_removed(tmp_path: Path) -> None:
    description = described(Samples(4, 1.0, 0, 100))
    examples = examples_of(12)
    build(tmp_path, description, examples)
    whole = contents_of(tmp_path)
    (shard,) = tmp_path.glob(f"part-*/{shard_name(1)}")
    with safe_open(shard, "np") as file:
        held = {bytes(key) for key in file.get_tensor("keys")}
    damage(shard)
    cache = TeacherCache.open(tmp_path)
    for example in examples:
        if example_key(*example) in held:
            with pytest.raises(DamagedCacheError, match=r"shard-00001\.safetensors: .* SHA-256 differs; remove it"):
                cache.targets(*example)
        else:
            assert_same(cache.targets(*example), said_about(example, description.contents))
    with pytest.raises(DamagedCacheError, match=r"shard-00001"):
        cache.verify()
    shard.unlink()
    with pytest.raises(DamagedCacheError, match=r"shard-00001\.safetensors: is missing; .*understudy teacher cache"):
        TeacherCache.open(tmp_path)
    (writer,) = writers(tmp_path, description, examples)
    assert list(writer.pending()) == [1]
    build(tmp_path, description, examples)
    assert contents_of(tmp_path) == whole


@pytest.mark.parametrize("name", ["index.safetensors", MARKER, "cache.json"])
@pytest.mark.parametrize("harm", [damage, lambda path: path.write_bytes(path.read_bytes()[:40])])
def test_a_changed_index_marker_or_description_is_refused_by_name(
    tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    build(tmp_path, described(TopK(3, 1.0, 100)), examples_of(5))
    (path,) = tmp_path.rglob(name)
    harm(path)
    with pytest.raises(UserError, match=name):
        TeacherCache.open(tmp_path).verify()


def test_a_part_of_another_cache_is_refused(tmp_path: Path) -> None:
    for name, contents in (("a", TopK(3, 1.0, 100)), ("b", TopK(3, 2.0, 100))):
        build(tmp_path / name, described(contents), examples_of(5))
    (part,) = (tmp_path / "a").glob("part-*")
    (other,) = (tmp_path / "b").glob("part-*")
    other.rename(tmp_path / "other")
    part.rename(other)
    with pytest.raises(DamagedCacheError, match="belongs to another teacher cache"):
        TeacherCache.open(tmp_path / "b")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (described(TopK(3, 1.0, 100), teacher="B"), "teacher teacher instead of B"),
        (described(TopK(3, 1.0, 100), tokenizer="B"), "tokenizer tokenizer instead of B"),
        (described(TopK(8, 1.0, 100)), "k 3 instead of 8"),
        (described(TopK(3, 2, 100)), r"temperature 1\.0 instead of 2\.0"),
        (described(TopK(3, 1.0, 101)), "vocabulary_size 100 instead of 101"),
        (described(Samples(3, 1.0, 0, 100)), "kind top_k instead of samples;"),
        (described(Hidden(8, "bf16")), "kind top_k instead of hidden;"),
    ],
)
def test_another_cache_than_expected_is_refused_by_field(tmp_path: Path, other: CacheDescription, said: str) -> None:
    description = described(TopK(3, 1.0, 100))
    assert other.identity != description.identity
    build(tmp_path, description, examples_of(3))
    with pytest.raises(UserError, match=rf"{tmp_path}: .* built with {said}.*build it with .understudy teacher cache"):
        TeacherCache.open(tmp_path, other)
    with pytest.raises(UserError, match=f"built with {said}"):
        writers(tmp_path, other, examples_of(3))


def test_equal_descriptions_have_one_identity() -> None:
    assert described(TopK(3, 1, 100)).identity == described(TopK(3, 1.0, 100)).identity
    assert described(Samples(3, 1.0, 0, 100)).identity != described(Samples(3, 1.0, 1, 100)).identity
    assert described(Hidden(8, "bf16")).identity != described(Hidden(8, "fp32")).identity


def test_nothing_there_is_said_with_the_command_that_builds_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: there is no teacher cache; build it with `understudy teacher cache"):
        TeacherCache.open(tmp_path / "absent")


def test_a_missing_example_is_said_and_a_second_build_adds_it(tmp_path: Path) -> None:
    description = described(TopK(3, 1.0, 100))
    first, second = examples_of(10), examples_of(10, seed=1)
    build(tmp_path, description, first)
    before = contents_of(tmp_path)
    cache = TeacherCache.open(tmp_path)
    assert example_key(*first[0]) in cache
    with pytest.raises(UserError, match=r"of 10 examples lacks one .*`understudy teacher cache RECIPE` adds"):
        cache.targets(*second[0])
    # What is there stays as it is, and an open cache stays usable.
    assert build(tmp_path, description, [*first, *second]).examples == 10
    assert before.items() <= contents_of(tmp_path).items()
    both = TeacherCache.open(tmp_path)
    both.verify()
    assert len(both) == 20
    for example in (*first, *second):
        assert_same(both.targets(*example), said_about(example, description.contents))
    assert_same(cache.targets(*first[0]), said_about(first[0], description.contents))
    assert build(tmp_path, description, second) == BuiltSize(0, 0, 0)


def test_reading_changes_nothing_on_the_disk(tmp_path: Path) -> None:
    examples = examples_of(10)
    build(tmp_path, described(TopK(3, 1.0, 100)), examples)
    with tracing(tmp_path, vouching=MARKER) as tracer:
        cache = TeacherCache.open(tmp_path)
        cache.batch_targets(examples)
        cache.verify()
    assert [state.operation for state in tracer.states if state.case == "killed"] == ["the next save"]


def test_the_marker_is_what_sha256sum_checks(tmp_path: Path) -> None:
    build(tmp_path, described(TopK(3, 1.0, 100)), examples_of(10))
    (part,) = tmp_path.glob("part-*")
    done = subprocess.run(["sha256sum", "-c", MARKER], cwd=part, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count(": OK")) == (0, 2)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (TopKRows(torch.tensor([[1, 2]]), torch.tensor([[torch.nan, -1.0]]), torch.tensor([-1.0])), "not finite"),
        (TopKRows(torch.tensor([[1, 2]]), torch.tensor([[-1.0, -1.0]]), torch.tensor([-3.0])), "mass of one"),
        (TopKRows(torch.tensor([[1, 100]]), torch.tensor([[-0.6931, -0.6931]]), torch.tensor([-30.0])), "to 100 in"),
        (TopKRows(torch.tensor([[1]]), torch.tensor([[0.0]]), torch.tensor([-30.0])), r"\[N, 2\] is expected"),
    ],
)
def test_what_no_teacher_says_is_not_stored(rows: TopKRows, said: str) -> None:
    with pytest.raises((UserError, ValueError), match=said):
        TopK(2, 1.0, 100).encode(rows)


def test_rows_that_do_not_fit_the_examples_are_not_written(tmp_path: Path) -> None:
    examples = [(np.array([1, 2, 3]), np.array([True, True, False]))]
    (writer,) = writers(tmp_path, described(Hidden(4, "fp32")), examples)
    with pytest.raises(ValueError, match="of 2 rows"):
        writer.write(0, HiddenRows(torch.zeros(3, 4)))
    with pytest.raises(UserError, match="not finite"):
        writer.write(0, HiddenRows(torch.full((2, 4), torch.inf)))
    assert list(writer.pending()) == [0]


def test_two_builders_at_once_take_turns(tmp_path: Path) -> None:
    directory = tmp_path / "teachers" / "cache"
    said: list[str] = []
    context = multiprocessing.get_context("spawn")
    waiting, admitted = context.Event(), context.Event()
    other = context.Process(target=_wait_for_turn, args=(directory, waiting, admitted))
    with building(directory, said.append):
        other.start()
        assert waiting.wait(60)
        assert not admitted.is_set()
    other.join(60)
    assert admitted.is_set()
    assert (other.exitcode, said) == (0, [])


def _wait_for_turn(directory: Path, waiting: Event, admitted: Event) -> None:
    with building(directory, lambda line: waiting.set()):
        admitted.set()
