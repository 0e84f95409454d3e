"""Builds the cache of what a teacher says about a recipe's data, in processes of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from understudy.data.cache import TokenCache
from understudy.data.prepare import PreparedData, prepare_data
from understudy.devices.detect import detect_machine
from understudy.launch.run_directory import RunDirectory
from understudy.launch.signals import StopRequests
from understudy.models.source import read_config
from understudy.models.tokenizer import load_tokenizer, prepared_tokenizer
from understudy.objectives.teachers.cache_format import CacheDescription
from understudy.objectives.teachers.cache_writer import CacheWriter, building
from understudy.plan.machine import Machine
from understudy.recipe.environment import cache_directory
from understudy.recipe.objectives import Distillation
from understudy.recipe.rules import check_processes
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.recipe.teachers import CachedTeacher
from understudy.training.cache_difference import Difference, StudentPlace, find_student
from understudy.training.choosing import choose_as_usual
from understudy.training.job import Job, TeacherPlace, write_job
from understudy.training.start import chosen_processes
from understudy.training.teacher_cache import Examples, describe_cache
from understudy.training.teacher_model import (
    TEACHER,
    classes_of,
    find_directory,
    judge_teacher,
    open_teacher,
    teacher_dtype,
)
from understudy.training.teacher_processes import process_directory, run_teacher_processes, stopping_on_request

__all__ = ["Asked", "build_teacher_caches", "examples_of"]


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
            resolved = choose_as_usual(recipe, machine, processes).recipe
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
            student = None
            if any(section.targets == "top_k" for section in cached):
                student = find_student(resolved, sources, tokenizer, data, say)
        asked = Question(resolved, sources, tokenizer, data, student)
        return [_build(asked, section, machine, requests, say) for section in cached]


@dataclass(frozen=True)
class Question:
    """What teachers are asked about."""

    recipe: Recipe
    """Resolved."""
    sources: SourceMap
    tokenizer: Path
    data: PreparedData
    student: StudentPlace | None
    """None where no difference can be told for it."""


def _build(
    question: Question,
    section: CachedTeacher,
    machine: Machine,
    requests: StopRequests,
    say: Callable[[str], None],
) -> Path:
    with ExitStack() as stack:
        with requests.interruptible():
            job, description = _found(question, section)
            (place,), examples, processes = job.teachers, examples_of(job), job.recipe.cluster.processes
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
            f"left out: {lost / tokens:.2e} nats a token of forward KL, for a student that takes all other tokens for "
            "equally likely"
        )
    if (difference := asked[0].difference) is not None:
        say(difference.in_words())
    return place.cache


def _found(question: Question, section: CachedTeacher) -> tuple[Job, CacheDescription]:
    """What the processes are told, and what names the cache."""
    recipe, sources, tokenizer_directory, data, student = (
        question.recipe,
        question.sources,
        question.tokenizer,
        question.data,
        question.student,
    )
    with sources.placing(TEACHER):
        opened = open_teacher(find_directory(section), teacher_dtype(recipe, section))
        tokenizer = load_tokenizer(tokenizer_directory, recipe.data.chat_template)
        caches = [TokenCache.open(path) for path in (data.train, data.evaluation) if path is not None]
        longest = max(int(cache.lengths.max()) for cache in caches)
        shared = judge_teacher(opened, section.path, tokenizer, classes_of(recipe), longest)
    description = describe_cache(recipe, section, opened, tokenizer, shared)
    cache = description.directory(cache_directory())
    assert isinstance(recipe.objective, Distillation), "only distillation has a teacher"
    alone = recipe.objective.model_copy(update={"teacher": section})
    job = Job(
        recipe=recipe.model_copy(update={"objective": alone}),
        sources=sources,
        run_directory=cache,
        model_directory=opened.directory if student is None else student.model,
        adapter_directory=None if student is None else student.adapter,
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
    difference: Difference | None = None
    """Of rank 0, where one can be told."""

    def write(self, directory: RunDirectory, rank: int) -> None:
        (directory.path / f"asked-{rank}.json").write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(directory: RunDirectory, rank: int) -> Asked:
        values = json.loads((directory.path / f"asked-{rank}.json").read_text())
        difference = values.pop("difference")
        return Asked(**values, difference=None if difference is None else Difference(*difference))


def examples_of(job: Job) -> Examples:
    return Examples(tuple(TokenCache.open(path) for path in (job.train, job.evaluation) if path is not None))
