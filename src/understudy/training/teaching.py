"""The teacher of a distillation: found and judged before any process starts, put together in each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from understudy.contracts import Strategy
from understudy.data.cache import TokenCache
from understudy.devices.detect import detect_machine
from understudy.errors import UserError
from understudy.models.adapters.switching import without_adapter
from understudy.models.head import LossHead
from understudy.models.language_model import LanguageModel
from understudy.objectives.teachers.aligned_documents import AlignedDocuments
from understudy.objectives.teachers.aligned_teacher import AlignedTeacher
from understudy.objectives.teachers.base_teacher import BaseTeacher
from understudy.objectives.teachers.cache_reader import TeacherCache
from understudy.objectives.teachers.cached_teacher import CachedTeacher
from understudy.objectives.teachers.model_teacher import ModelTeacher
from understudy.objectives.teachers.several_teachers import SeveralTeachers
from understudy.objectives.teachers.teacher import Teacher, Teaching
from understudy.parallel.world import World
from understudy.recipe import teachers as sections
from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.strategies.held import held_bytes
from understudy.strategies.teaching import hold, hold_sharded
from understudy.training.aligning import align_teacher
from understudy.training.hidden_states import matched_layers
from understudy.training.job import TeacherPlace
from understudy.training.on_policy import longest_answered
from understudy.training.served_answers import require_student_server
from understudy.training.teacher_cache import Examples, describe_cache, require_examples
from understudy.training.teacher_model import (
    TEACHER,
    OpenedTeacher,
    classes_of,
    find_directory,
    judge_teacher,
    open_teacher,
    teacher_dtype,
)
from understudy.training.teacher_server import find_server, make_server_teacher

__all__ = ["find_teachers", "make_teaching"]

ON_POLICY = "objective.on_policy"


def find_teachers(
    recipe: Recipe,
    sources: SourceMap,
    student: LanguageModel,
    student_tokenizer: Any,
    train: TokenCache | None,
    evaluation: TokenCache | None,
    report: Callable[[str], None],
) -> tuple[TeacherPlace, ...]:
    """Where each of the recipe's teachers is, who are to be asked about examples of `train` and `evaluation`; none for
    an objective without. Raises `UserError` at the recipe's line when there is no such teacher, when it does not read
    as the student does, when its positions are fewer than an example has, when its cache does not have all of them, and
    when its server does not answer."""
    objective = recipe.objective
    if not isinstance(objective, Distillation):
        return ()
    data = [cache for cache in (train, evaluation) if cache is not None]
    longest = max(int(cache.lengths.max()) for cache in data)
    if objective.on_policy_fraction:
        longest = longest_answered(recipe, student.document_limit)
        if objective.on_policy.endpoint is not None:
            with sources.placing(f"{ON_POLICY}.endpoint"):
                require_student_server(recipe, objective.on_policy, f"{ON_POLICY}.endpoint")
    places = []
    several = isinstance(objective.teacher, sections.SeveralTeachers)
    for i, section in enumerate(objective.teachers):
        key = f"{TEACHER}.teachers.{i}" if several else TEACHER
        if isinstance(section, sections.ServerTeacher):
            with sources.placing(key):
                places.append(find_server(section, student_tokenizer, data, key, report))
            continue
        if isinstance(section, sections.BaseTeacher):
            count = sum(parameter.numel() for parameter in student.parameters())
            classes = student.config.get_text_config().vocab_size
            places.append(TeacherPlace(None, None, classes, parameters=count))
            continue
        assert isinstance(section, sections.LocalTeacher), "what is left"
        with sources.placing(key):
            _require_device(section, recipe)
            with sources.placing(f"{key}.path"):
                directory = find_directory(section, report, key)
            opened = open_teacher(directory, teacher_dtype(recipe, section))
            if objective.divergence == "uld":
                vocabulary = student.config.get_text_config().vocab_size
                aligned = align_teacher(
                    recipe, sources, section, opened, student_tokenizer, vocabulary, train, evaluation, report
                )
                places.append(replace(aligned, parameters=_parameters(opened)))
                continue
            shared = judge_teacher(opened, section.path, student_tokenizer, classes_of(recipe), longest)
        cache = None
        if isinstance(section, sections.CachedTeacher):
            description = describe_cache(recipe, section, opened, student_tokenizer, shared)
            cache = require_examples(sources, description, data, key)
        runs = 0 if cache else _parameters(opened)
        places.append(TeacherPlace(opened.directory, cache, shared, parameters=runs))
    return tuple(places)


def _parameters(opened: OpenedTeacher) -> int:
    return sum(parameter.numel() for parameter in opened.model.parameters())


def _require_device(section: sections.OneTeacher, recipe: Recipe) -> None:
    if not isinstance(section, sections.ResidentTeacher) or section.device != "other":
        return
    machine, processes = detect_machine(), recipe.cluster.processes
    assert processes != "auto", "the recipe must be resolved first"
    if machine.devices < 2 * processes:
        raise UserError(
            f"`device: other` needs two devices a process, and this host has {machine.devices} for {processes}; start "
            "fewer processes, or say `device: host`."
        )


def make_teaching(
    recipe: Recipe,
    places: Sequence[TeacherPlace],
    student: LanguageModel,
    strategy: Strategy,
    device: torch.device,
    world: World,
    say: Callable[[str], None] = lambda line: None,
) -> Teaching | None:
    """Who teaches in this process; None for an objective without a teacher. `student` is the module that `strategy`
    trains; `say` is told of a teacher that does not answer for a while. A collective."""
    objective = recipe.objective
    if not isinstance(objective, Distillation):
        return None
    made = []
    for section, place in zip(objective.teachers, places, strict=True):
        if isinstance(section, sections.ServerTeacher):
            server = make_server_teacher(section, place, world.rank, say)
            made.append(Teaching(server, place.shared_classes, server.ask))
        else:
            teacher, held = _teacher(recipe, section, place, student, strategy, device, world)
            made.append(Teaching(teacher, place.shared_classes, held_bytes=held))
    if not isinstance(objective.teacher, sections.SeveralTeachers):
        return made[0]
    together = SeveralTeachers(tuple(zip(objective.teacher.shares, made)))
    ask = together.ask if any(each.ask for each in made) else None
    return Teaching(together, None, ask, sum(each.held_bytes for each in made))


def _teacher(
    recipe: Recipe,
    section: sections.OneTeacher,
    place: TeacherPlace,
    student: LanguageModel,
    strategy: Strategy,
    device: torch.device,
    world: World,
) -> tuple[Teacher, int]:
    """The teacher, and the bytes of weights that it holds in this process beside the student's."""
    pairs = matched_layers(recipe, student, place)
    if isinstance(section, sections.BaseTeacher):
        return BaseTeacher(strategy, partial(without_adapter, student), student.head, pairs), 0
    assert isinstance(section, sections.LocalTeacher), "servers are no part of this process"
    assert place.directory is not None, "the parent found it"
    dtype = teacher_dtype(recipe, section)
    opened = open_teacher(place.directory, dtype)
    if isinstance(section, sections.CachedTeacher):
        assert place.cache is not None, "the parent found it"
        alone = _head(section, opened, device, dtype)
        held = 0 if alone is None else held_bytes(alone).frozen
        return CachedTeacher(TeacherCache.open(place.cache), alone), held
    if isinstance(section, sections.ShardedTeacher):
        hold_sharded(opened.model, opened.read, device, dtype, world)
        teacher = ModelTeacher(opened.model, opened.model.head, device, pairs)
        return _reading(teacher, place, device), held_bytes(opened.model).frozen
    assert isinstance(section, sections.ResidentTeacher), "what is left"
    placed = _placed(section, device, world)
    hold(opened.model, opened.read, placed, dtype)
    head = opened.model.head
    # Hidden states go from device to device, not logits, so the head is where they are wanted.
    head = head if placed == device else deepcopy(head).to(device)
    teacher = ModelTeacher(opened.model, head, placed, pairs)
    return _reading(teacher, place, device), held_bytes(opened.model).frozen


def _reading(teacher: ModelTeacher, place: TeacherPlace, device: torch.device) -> Teacher:
    """`teacher`, with its own tokenizer where that is another."""
    if place.alignment is None:
        return teacher
    examples = Examples(tuple(map(TokenCache.open, place.examples)))
    return AlignedTeacher(teacher, AlignedDocuments(place.alignment), lambda number: examples[number][0], device)


def _placed(section: sections.ResidentTeacher, device: torch.device, world: World) -> torch.device:
    """Where the teacher of the process on `device` is. Those for teachers come behind those for processes."""
    if section.device == "host":
        return torch.device("cpu")
    if section.device == "own":
        return device
    assert device.index is not None, "found before that there is another"
    return torch.device(device.type, device.index + world.local_size)


def _head(
    section: sections.CachedTeacher, opened: OpenedTeacher, device: torch.device, dtype: torch.dtype
) -> LossHead | None:
    """Of the teacher, alone, where its last hidden states are kept."""
    if section.targets != "hidden":
        return None
    head = opened.model.head
    names = {id(parameter): name for name, parameter in opened.model.network.named_parameters()}
    for name, parameter in list(head.named_parameters(recurse=False)):
        values = opened.read(names[id(parameter)])[:].to(device, dtype)
        setattr(head, name, torch.nn.Parameter(values, requires_grad=False))
    return head
