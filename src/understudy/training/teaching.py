"""The teacher of a distillation: found and judged before any process starts, put together in each of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from understudy.contracts import Strategy
from understudy.data.cache import TokenCache
from understudy.models.adapters.switching import without_adapter
from understudy.models.head import LossHead
from understudy.models.language_model import LanguageModel
from understudy.objectives.teachers.base_teacher import BaseTeacher
from understudy.objectives.teachers.cache_reader import TeacherCache
from understudy.objectives.teachers.cached_teacher import CachedTeacher
from understudy.objectives.teachers.model_teacher import ModelTeacher
from understudy.objectives.teachers.teacher import Teacher, Teaching
from understudy.parallel.world import World
from understudy.recipe import objectives as recipe_section
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.strategies.precision import precision_of
from understudy.strategies.teaching import hold, hold_sharded
from understudy.training.job import TeacherPlace
from understudy.training.teacher_cache import describe_cache, require_examples
from understudy.training.teacher_model import TEACHER, OpenedTeacher, judge_teacher, open_teacher

__all__ = ["find_teacher", "make_teaching"]


def find_teacher(
    recipe: Recipe, sources: SourceMap, student: LanguageModel, student_tokenizer: Any, data: Sequence[TokenCache]
) -> TeacherPlace | None:
    """Where the recipe's teacher is; None for an objective without one. Raises `UserError` at the recipe's line when
    there is no such teacher, when it does not read as the student does, when its positions are fewer than an example of
    `data` has, and when its cache does not have all of `data`."""
    objective = recipe.objective
    if not isinstance(objective, recipe_section.Distillation):
        return None
    section = objective.teacher
    if isinstance(section, recipe_section.BaseTeacher):
        return TeacherPlace(None, None, student.config.get_text_config().vocab_size)
    with sources.placing(TEACHER):
        opened = open_teacher(recipe, section)
        shared = judge_teacher(opened, section.path, student_tokenizer, max(int(cache.lengths.max()) for cache in data))
    if not isinstance(section, recipe_section.CachedTeacher):
        return TeacherPlace(opened.directory, None, shared)
    description = describe_cache(recipe, opened, student_tokenizer, shared)
    return TeacherPlace(opened.directory, require_examples(sources, description, data), shared)


def make_teaching(
    recipe: Recipe,
    place: TeacherPlace | None,
    student: LanguageModel,
    strategy: Strategy,
    device: torch.device,
    world: World,
) -> Teaching | None:
    """Who teaches in this process; None for an objective without a teacher. `student` is the module that `strategy`
    trains. A collective."""
    objective = recipe.objective
    if not isinstance(objective, recipe_section.Distillation):
        return None
    assert place is not None, "the parent found it"
    section, dtype = objective.teacher, precision_of(recipe.training.precision).compute
    if isinstance(section, recipe_section.BaseTeacher):
        base = BaseTeacher(strategy.hidden, partial(without_adapter, student), student.head)
        return Teaching(base, place.shared_classes)
    opened = open_teacher(recipe, section)
    teacher: Teacher
    if isinstance(section, recipe_section.CachedTeacher):
        assert place.cache is not None, "the parent found it"
        teacher = CachedTeacher(TeacherCache.open(place.cache), _head(section, opened, device, dtype))
    else:
        if isinstance(section, recipe_section.ShardedTeacher):
            hold_sharded(opened.model, opened.read, device, dtype, world)
        else:
            hold(opened.model, opened.read, device, dtype)
        teacher = ModelTeacher(opened.model, opened.model.head)
    return Teaching(teacher, place.shared_classes)


def _head(
    section: recipe_section.CachedTeacher, opened: OpenedTeacher, device: torch.device, dtype: torch.dtype
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
