"""What of a teacher's vocabulary is compared with a student's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_adapters import write_model
from understudy.errors import UserError
from understudy.models.tokenizer import load_tokenizer
from understudy.objectives.teachers.cache_contents import TopK
from understudy.objectives.teachers.cache_format import CacheDescription
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.recipe.teachers import ResidentTeacher
from understudy.training.resume import determinants
from understudy.training.teacher_cache import require_examples
from understudy.training.teacher_model import classes_of, find_directory, judge_teacher, open_teacher

pytestmark = pytest.mark.unit

TOKENS = 13
"""Of the tokenizer; heads are padded to 16."""


def recipe(model: dict[str, Any], teacher: str = "unused") -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "output_dir": "unused",
            "model": model,
            "data": {"train": [{"path": "unused"}]},
            "objective": {"kind": "distillation", "teacher": {"kind": "resident", "path": teacher}},
        }
    )


def test_heads_of_one_length_are_compared_whole_and_others_by_tokens(tmp_path: Path) -> None:
    opened = open_teacher(write_model(tmp_path / "teacher"), torch.float32)
    student = load_tokenizer(write_model(tmp_path / "student", vocab_size=24))

    def shared(model: dict[str, Any]) -> int:
        return judge_teacher(opened, "teacher", student, classes_of(recipe(model)), longest=9)

    same = {"init": "random", "config": {"model_type": "llama", "vocab_size": 16}, "tokenizer": "unused"}
    assert shared(same) == 16
    assert shared({"path": str(tmp_path / "teacher")}) == 16
    assert shared({"path": str(tmp_path / "student")}) == TOKENS
    assert shared({"path": str(tmp_path / "teacher"), "new_tokens": ["<extra>"]}) == TOKENS


def test_a_teacher_that_was_moved_is_the_same_and_another_is_not() -> None:
    told = [determinants(recipe({"path": "student"}, path)) for path in ("/a/teacher", "b/teacher", "b/other")]
    assert told[0] == told[1] != told[2]


def test_what_is_wrong_with_one_of_several_teachers_is_said_of_that_one(tmp_path: Path) -> None:
    key = "objective.teacher.teachers.1"
    with pytest.raises(UserError, match=f"remove {key}.revision") as refused:
        find_directory(ResidentTeacher(path=str(tmp_path), revision="main"), key=key)
    assert refused.value.key == f"{key}.revision"


@pytest.mark.parametrize("overridden", [frozenset(), frozenset({"training.seed"})])
def test_a_cache_that_is_missing_is_said_where_its_teacher_is_named(
    overridden: frozenset[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path))
    key = "objective.teacher.teachers.1"
    sources = SourceMap("recipe.yaml", {"objective": 3, "objective.teacher": 4, key: 7}, overridden)
    same = " with what else was said on the command line" if overridden else ""
    with pytest.raises(UserError) as refused:
        require_examples(sources, CacheDescription("teacher", "tokenizer", TopK(4, 1.0, 16)), [], key)
    assert str(refused.value) == (
        "recipe.yaml:7: there is no cache yet of this teacher for this tokenizer, chat template, temperature and these "
        f"targets; `understudy teacher cache recipe.yaml`{same} builds it."
    )
