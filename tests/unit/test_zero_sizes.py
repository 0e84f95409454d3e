"""Sizes of ZeRO's buckets: by one rule in the plan and in the engine; a DeepSpeed file's numbers hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from understudy.plan.estimate import Estimator
from understudy.plan.hardware.hardware import parse_hardware
from understudy.plan.machine import Machine
from understudy.plan.memory.buckets import zero_sizes
from understudy.plan.resolve import resolve
from understudy.plan.search import best
from understudy.plan.shape.model import model_shape
from understudy.recipe.schema import DeepSpeed, Recipe
from understudy.strategies.engine_config import engine_config
from understudy.strategies.precision import precision_of

pytestmark = pytest.mark.unit

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
COUNT = 8_030_261_248
GIVEN = {"reduce_bucket_size": 1000, "allgather_bucket_size": "auto", "stage3_max_live_parameters": 2e6}


def recipe_with(strategy: Any, **training: Any) -> Recipe:
    values: dict[str, Any] = {"name": "r", "output_dir": "o", "model": {"path": "m"}, "strategy": strategy}
    values["training"] = {"precision": "bf16", "global_batch_size": 64, **training}
    return Recipe.model_validate({**values, "data": {"train": [{"path": "a"}], "max_length": 1024}})


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("buckets", ["large", "small"])
@pytest.mark.parametrize("given", [{}, GIVEN])
def test_the_engine_gets_what_is_planned(tmp_path: Path, stage: int, buckets: str, given: dict[str, Any]) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage, **given}}))
    recipe = recipe_with({"kind": "deepspeed", "config": str(tmp_path / "ds.json"), "buckets": buckets})
    assert isinstance(recipe.strategy, DeepSpeed)
    config = engine_config(recipe, precision_of("bf16"), world_size=8, hidden_size=4096, num_trained=COUNT)
    estimator = Estimator(recipe, parse_hardware("8xA100-80GB"), model_shape(LLAMA_8B), ())
    planned = estimator._setting(recipe.strategy, accumulates=True).sizes
    ours = {key: value for key, value in planned.items() if stage == 3 or not key.startswith("stage3_")}
    assert config["zero_optimization"].items() >= ours.items()
    assert "auto" not in config["zero_optimization"].values()
    if given:
        assert planned["reduce_bucket_size"] == 1000
        assert planned["stage3_max_live_parameters"] == 2_000_000


@pytest.mark.parametrize(("hidden", "trained"), [(64, 10_000), (1024, 5 * 10**8), (4096, COUNT), (16384, 4 * 10**11)])
def test_small_buckets_are_no_larger_than_large_ones(hidden: int, trained: int) -> None:
    large, small = (zero_sizes({}, one, hidden=hidden, trained=trained) for one in ("large", "small"))
    assert all(small[key] <= large[key] for key in large)
    assert small["reduce_bucket_size"] <= trained
    assert all(sizes["allgather_bucket_size"] % 2 == 0 for sizes in (large, small))
    assert zero_sizes({}, "auto", hidden=hidden, trained=trained) == large


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero2-offload", "zero3-offload"])
def test_buckets_are_small_only_where_large_ones_leave_no_room(name: str) -> None:
    recipe = recipe_with(name)
    shape = model_shape(LLAMA_8B)

    def chosen(hardware: str, limit_bytes: int | None = None) -> str:
        plan = best(recipe, parse_hardware(hardware), shape, limit_bytes=limit_bytes)
        resolved, _ = resolve(recipe, Machine(8, 80 << 30, 8), 8, "bf16", plan)
        assert isinstance(resolved.strategy, DeepSpeed)
        assert plan.chosen is None or plan.chosen.strategy == resolved.strategy
        return resolved.strategy.buckets

    assert chosen("64xB200") == "large"
    assert isinstance(recipe.strategy, DeepSpeed)
    strategy = recipe.strategy.model_copy(update={"buckets": "large"})
    large = Estimator(recipe, parse_hardware("8xA100-80GB"), shape, ()).at(strategy, "full", 1024)
    assert chosen("8xA100-80GB", large.peak.total_bytes - 2**28) == "small"
