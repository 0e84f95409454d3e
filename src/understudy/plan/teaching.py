"""What a teacher costs a run, and when asking it once is cheaper. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import Recipe
from understudy.recipe.teachers import CachedTeacher, LocalTeacher

__all__ = ["TeacherCost", "cache_advice", "teacher_share"]

_TRAINED, _ADAPTED, _READ = 6, 4, 2
"""Operations a token and parameter: to train a model, to train an adapter in it, to read with it."""
_CACHE_PAYS_FROM = 2
"""Passes over the data from which a cache is cheaper: the first one fills it."""


@dataclass(frozen=True)
class TeacherCost:
    """What is known of a run before it starts."""

    teacher_parameters: int
    student_parameters: int
    passes: float
    """Over the training data."""
    supervised_tokens: int
    """Of training and evaluation data."""
    vocabulary_size: int


def teacher_share(cost: TeacherCost, *, adapted: bool) -> float:
    """The teacher's share of a run's computation; `adapted`: of the student only an adapter is trained."""
    read = _READ * cost.teacher_parameters
    return read / (read + (_ADAPTED if adapted else _TRAINED) * cost.student_parameters)


def cache_advice(recipe: Recipe, cost: TeacherCost) -> str | None:
    """The end of a line, which advises to keep what the teacher says; None where that is not cheaper, or impossible."""
    objective = recipe.objective
    assert isinstance(objective, Distillation), "only distillation has a teacher"
    teacher = objective.teacher
    cacheable = (
        isinstance(teacher, LocalTeacher)
        and not isinstance(teacher, CachedTeacher)
        and objective.divergence != "uld"
        and objective.hidden_states is None
        and not objective.on_policy_fraction
    )
    if not cacheable or cost.passes < _CACHE_PAYS_FROM:
        return None
    size = cost.supervised_tokens * _bytes_a_token(CachedTeacher(path="").kept, cost.vocabulary_size)
    return (
        f"asked {math.ceil(cost.passes)} times about each example. A cache asks once, serves every student, needs no "
        f"memory for the teacher and takes about {_readable(size)} of disk: objective.teacher.kind=cache, after "
        "`understudy teacher cache`"
    )


def _bytes_a_token(kept: int, vocabulary_size: int) -> int:
    """Of top-k targets on disk: ids, log-probabilities, the tail; see docs/teacher-cache.md."""
    high_bits = max(0, (vocabulary_size - 1).bit_length() - 16)
    return 4 * kept + 2 + math.ceil(kept * high_bits / 8)


def _readable(size: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:,.0f} {unit}"
        size = round(size / 1000)
    raise AssertionError("the last unit returns")
