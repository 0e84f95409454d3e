"""What a teacher says about a recipe's data, kept on the disk: which cache that is, and whether it has all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from understudy.data.cache import TokenCache
from understudy.models.identity import model_digest
from understudy.objectives.teachers.cache_contents import Contents, Hidden, Samples, TopK
from understudy.objectives.teachers.cache_format import CacheDescription, ExampleKeys, example_keys
from understudy.objectives.teachers.cache_reader import TeacherCache
from understudy.recipe.environment import cache_directory
from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.recipe.teachers import CachedTeacher
from understudy.training.teacher_model import OpenedTeacher, teacher_dtype

__all__ = ["Example", "Examples", "describe_cache", "require_examples"]

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


def require_examples(sources: SourceMap, description: CacheDescription, data: Sequence[TokenCache], key: str) -> Path:
    """The directory of the cache that `description` names. Raises `UserError` unless it is there and has every example,
    at the recipe's line of `key`, where the teacher is named."""
    directory = description.directory(cache_directory())
    if not directory.is_dir():
        raise sources.error(
            key,
            "there is no cache yet of this teacher for this tokenizer, chat template, temperature and these targets; "
            f"{_command(sources)} builds it.",
        )
    with sources.placing(key):
        cache = TeacherCache.open(directory, description)
    keys = Examples(tuple(data)).keys()
    asked = keys.keys[keys.num_supervised > 0]
    missing = sum(row.tobytes() not in cache for row in asked)
    if missing:
        raise sources.error(
            key,
            f"the teacher's cache lacks {missing:,} of {len(asked):,} examples: data, template or length changed since "
            f"it was built; {_command(sources)} adds them.",
        )
    return directory


def _command(sources: SourceMap) -> str:
    """What builds the cache, in words."""
    same = " with what else was said on the command line" if sources.overridden else ""
    return f"`understudy teacher cache {sources.file}`{same}"
