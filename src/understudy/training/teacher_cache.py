"""What a teacher says about a recipe's data, asked once and kept on the disk: which cache that is, and building it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from understudy.data.cache import TokenCache
from understudy.data.prepare import PreparedData, prepare_data
from understudy.devices.detect import detect_machine
from understudy.launch.run_directory import RunDirectory
from understudy.launch.signals import StopRequests
from understudy.models.identity import model_digest
from understudy.models.source import read_config
from understudy.models.tokenizer import load_tokenizer, prepared_tokenizer
from understudy.objectives.teachers.cache_contents import Contents, Hidden, Samples, TopK
from understudy.objectives.teachers.cache_format import CacheDescription, ExampleKeys, example_keys
from understudy.objectives.teachers.cache_reader import TeacherCache
from understudy.objectives.teachers.cache_writer import CacheWriter, building
from understudy.plan.machine import Machine
from understudy.plan.resolve import resolve
from understudy.recipe.environment import cache_directory
from understudy.recipe.objectives import Distillation
from understudy.recipe.rules import check_processes
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.recipe.teachers import CachedTeacher
from understudy.training.job import Job, TeacherPlace, write_job
from understudy.training.start import chosen_processes
from understudy.training.teacher_model import (
    TEACHER,
    OpenedTeacher,
    find_directory,
    judge_teacher,
    open_teacher,
    teacher_dtype,
)
from understudy.training.teacher_processes import process_directory, run_teacher_processes, stopping_on_request

__all__ = [
    "Asked",
    "Example",
    "Examples",
    "build_teacher_caches",
    "describe_cache",
    "examples_of",
    "require_examples",
]

Example = tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]
"""Tokens [L], and at which of them the next is supervised [L]."""


@dataclass(frozen=True)
class Examples:
    """Training and evaluation examples end to end, as a teacher is asked about them."""

    caches: tuple[TokenCache, ...]

    def __len__(self) -> int:
        return sum(map(len, self.caches))

    def __getitem__(self, index: int) -> Example:
        for cache in self.caches:
            if index < len(cache):
                supervised = cache.supervised(index).astype(np.bool_)
                return cache.tokens(index), np.append(supervised[1:], False)
            index -= len(cache)
        raise IndexError(index)

    def keys(self) -> ExampleKeys:
        return example_keys(self[i] for i in range(len(self)))


def describe_cache(
    recipe: Recipe, section: CachedTeacher, opened: OpenedTeacher, tokenizer: Any, shared: int
) -> CacheDescription:
    """Names the cache of the teacher in `section`, for a student that reads with `tokenizer` and has `shared` classes
    with it."""
    objective = recipe.objective
    assert isinstance(objective, Distillation), "only distillation has a teacher"
    dtype = str(teacher_dtype(recipe, section)).removeprefix("torch.")
    text = json.dumps([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template])
    return CacheDescription(
        teacher=f"{model_digest(opened.directory, cache_directory())} {dtype}",
        tokenizer=hashlib.sha256(text.encode()).hexdigest(),
        contents=_contents(recipe, objective, section, opened, shared, dtype),
    )


def _contents(
    recipe: Recipe,
    objective: Distillation,
    section: CachedTeacher,
    opened: OpenedTeacher,
    shared: int,
    dtype: str,
) -> Contents:
    if section.targets == "hidden":
        return Hidden(opened.model.head.in_features, "fp32" if dtype == "float32" else "bf16")
    if section.targets == "samples":
        return Samples(section.kept, objective.temperature, recipe.training.seed, shared)
    return TopK(min(section.kept, shared), objective.temperature, shared)


def require_examples(sources: SourceMap, description: CacheDescription, data: Sequence[TokenCache]) -> Path:
    """The directory of the cache that `description` names. Raises `UserError` at the recipe's line unless it is there
    and has every example."""
    directory = description.directory(cache_directory())
    if not directory.is_dir():
        raise sources.error(
            TEACHER,
            f"there is no cache of this teacher for this temperature and these targets yet; "
            f"`understudy teacher cache {sources.file}` builds it.",
        )
    with sources.placing(TEACHER):
        cache = TeacherCache.open(directory, description)
    keys = Examples(tuple(data)).keys()
    asked = keys.keys[keys.num_supervised > 0]
    missing = sum(row.tobytes() not in cache for row in asked)
    if missing:
        raise sources.error(
            TEACHER,
            f"the teacher's cache lacks {missing:,} of {len(asked):,} examples: data, template or length changed since "
            f"it was built; `understudy teacher cache {sources.file}` adds them.",
        )
    return directory


def build_teacher_caches(recipe: Recipe, sources: SourceMap, say: Callable[[str], None]) -> list[Path]:
    """Has each teacher of the recipe that is to be cached look at all of its examples that the cache does not have yet,
    in as many processes as training would have, and keeps what it says. Returns the caches' directories. What was there
    stays.

    Raises `UserError` at the recipe's line where there is no such teacher or it does not read as the student does, and
    `StoppedError` when asked to stop.
    """
    objective = recipe.objective
    sections = objective.teachers if isinstance(objective, Distillation) else ()
    cached = [section for section in sections if isinstance(section, CachedTeacher)]
    if not cached:
        raise sources.error(
            "objective", "this recipe reads no teacher's cache; say `objective.teacher: {kind: cache, path: …}`."
        )
    with stopping_on_request() as requests:
        with requests.interruptible():
            machine = detect_machine()
            processes = chosen_processes(recipe, sources, machine)
            check_processes(recipe, processes, sources)
            resolved, _ = resolve(recipe, machine, processes)
            with sources.placing("model.tokenizer" if recipe.model.tokenizer else "model.path"):
                tokenizer = prepared_tokenizer(resolved.model, cache_directory())
                vocabulary = read_config(resolved.model).get("vocab_size")
            data = prepare_data(
                resolved,
                sources,
                tokenizer_dir=tokenizer,
                vocab_size=None if resolved.model.new_tokens else vocabulary,
                cache_dir=cache_directory(),
                report=say,
            )
        return [_build(resolved, sources, section, tokenizer, data, machine, requests, say) for section in cached]


def _build(
    recipe: Recipe,
    sources: SourceMap,
    section: CachedTeacher,
    tokenizer: Path,
    data: PreparedData,
    machine: Machine,
    requests: StopRequests,
    say: Callable[[str], None],
) -> Path:
    with ExitStack() as stack:
        with requests.interruptible():
            job, description = _found(recipe, sources, section, tokenizer, data)
            (place,), examples, processes = job.teachers, examples_of(job), recipe.cluster.processes
            assert place.cache is not None, "it was just named"
            assert processes != "auto", "the recipe must be resolved first"
            stack.enter_context(building(place.cache, say))
            writer = CacheWriter(place.cache, description, 0, 1, examples.keys())
        if not writer.num_shards:
            say(f"nothing to do: {place.cache} has all {len(examples):,} examples")
            return place.cache
        with process_directory() as directory:
            write_job(directory.job, job)
            run_teacher_processes("understudy.training.teacher_cache_worker", processes, machine, directory)
            asked = [Asked.read(directory, rank) for rank in range(processes)]
        size = writer.commit()
    say(
        f"teacher cache: {place.cache}\n{size.examples:,} examples, {size.tokens:,} supervised tokens, "
        f"{size.bytes_per_token:.1f} bytes a token"
    )
    tokens = sum(each.tokens for each in asked)
    if tokens and description.contents.kind == "top_k":
        lost = sum(each.left_out for each in asked)
        say(
            f"what is left out: at most {lost / tokens:.2e} nats a token of forward KL, for a student that takes all "
            "other tokens for equally likely"
        )
    return place.cache


def _found(
    recipe: Recipe, sources: SourceMap, section: CachedTeacher, tokenizer_directory: Path, data: PreparedData
) -> tuple[Job, CacheDescription]:
    """What the processes are told, and what names the cache. `recipe` is resolved."""
    with sources.placing(TEACHER):
        opened = open_teacher(find_directory(section), teacher_dtype(recipe, section))
        tokenizer = load_tokenizer(tokenizer_directory, recipe.data.chat_template)
        caches = [TokenCache.open(path) for path in (data.train, data.evaluation) if path is not None]
        longest = max(int(cache.lengths.max()) for cache in caches)
        shared = judge_teacher(opened, section.path, tokenizer, longest)
    description = describe_cache(recipe, section, opened, tokenizer, shared)
    cache = description.directory(cache_directory())
    assert isinstance(recipe.objective, Distillation), "only distillation has a teacher"
    alone = recipe.objective.model_copy(update={"teacher": section})
    job = Job(
        recipe=recipe.model_copy(update={"objective": alone}),
        sources=sources,
        run_directory=cache,
        model_directory=opened.directory,
        adapter_directory=None,
        tokenizer_directory=tokenizer_directory,
        teachers=(TeacherPlace(opened.directory, cache, shared),),
        train=data.train,
        evaluation=data.evaluation,
    )
    return job, description


@dataclass(frozen=True)
class Asked:
    """What one process asked its teacher."""

    tokens: int = 0
    """Supervised ones."""
    left_out: float = 0.0
    """Nats, summed over them; see `Kept`."""

    def write(self, directory: RunDirectory, rank: int) -> None:
        (directory.path / f"asked-{rank}.json").write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(directory: RunDirectory, rank: int) -> Asked:
        return Asked(**json.loads((directory.path / f"asked-{rank}.json").read_text()))


def examples_of(job: Job) -> Examples:
    return Examples(tuple(TokenCache.open(path) for path in (job.train, job.evaluation) if path is not None))
