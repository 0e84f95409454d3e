"""What a teacher costs, and when a cache is cheaper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from understudy.checkpoint.safetensors_writer import spec_bytes
from understudy.objectives.teachers.cache_contents import TopK
from understudy.plan.teaching import TeacherCost, cache_advice, teacher_share
from understudy.recipe.schema import Recipe

pytestmark = pytest.mark.unit

COST = TeacherCost(8_000_000_000, 1_000_000_000, passes=3.0, supervised_tokens=1_000_000, vocabulary_size=128_256)


def recipe(teacher: dict[str, Any] | str, **objective: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "output_dir": "unused",
            "model": {"path": "unused"},
            "data": {"train": [{"path": "unused"}]},
            "objective": {"kind": "distillation", "teacher": teacher, **objective},
        }
    )


RESIDENT = {"kind": "resident", "path": "teacher"}


def test_the_share_counts_reading_against_training() -> None:
    assert teacher_share(COST, adapted=False) == pytest.approx(16 / 22)
    assert teacher_share(COST, adapted=True) == pytest.approx(16 / 20)


def test_a_cache_is_advised_from_the_second_pass_on() -> None:
    advice = cache_advice(recipe(RESIDENT), COST)
    assert advice is not None
    assert advice.startswith("asked 3 times about each example. ")
    assert "266 MB of disk" in advice
    assert cache_advice(recipe(RESIDENT), replace(COST, passes=1.9)) is None


@pytest.mark.parametrize(
    "given",
    [
        recipe({"kind": "cache", "path": "teacher"}),
        recipe({"kind": "server", "path": "teacher", "endpoints": ["http://127.0.0.1:1/v1"]}),
        recipe("base"),
        recipe(RESIDENT, divergence="uld"),
        recipe(RESIDENT, hidden_states={}),
        recipe(RESIDENT, on_policy_fraction=0.5),
    ],
)
def test_no_cache_is_advised_where_none_can_be(given: Recipe) -> None:
    assert cache_advice(given, COST) is None


@pytest.mark.parametrize("vocabulary", [49_152, 65_536, 65_537, 128_256, 151_936])
def test_the_size_is_that_of_the_format(vocabulary: int) -> None:
    row = sum(spec_bytes(spec) for spec in TopK(64, 1.0, vocabulary).layout().values())
    advice = cache_advice(recipe(RESIDENT), replace(COST, vocabulary_size=vocabulary))
    assert advice is not None
    assert f"{row} MB of disk" in advice
