"""What a run takes for `auto`: the planner's choice here, what it did before, or the usual; and when it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from understudy.errors import OutOfMemoryError
from understudy.plan.hardware.hardware import parse_hardware
from understudy.plan.machine import Machine
from understudy.recipe.dump import dump_recipe
from understudy.recipe.schema import DeepSpeed, Recipe
from understudy.recipe.source_map import SourceMap
from understudy.training import choosing, planning
from understudy.training.choosing import choose, find_earlier

pytestmark = pytest.mark.unit

MACHINE = Machine(devices=8, device_bytes=40 << 30, cores=8)
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
FIXED = {"micro_batch_tokens": 2048, "activation_checkpointing": "none", "precision": "bf16"}


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says which hardware this machine is."""

    def set_hardware(name: str) -> None:
        monkeypatch.setattr(choosing, "hardware_here", lambda *_: parse_hardware(name))

    return set_hardware


def recipe_with(tmp_path: Path, config: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config or LLAMA_8B))
    values = {"name": "r", "output_dir": str(tmp_path / "run"), "model": {"path": str(tmp_path / "m")}}
    return Recipe.model_validate({**values, "data": {"train": [{"path": "a"}]}, **sections})


def begun(recipe: Recipe) -> Recipe:
    """As a run leaves it in its directory."""
    directory = Path(recipe.output_dir)
    directory.mkdir()
    (directory / "recipe.yaml").write_text(dump_recipe(recipe))
    return recipe


def test_a_memory_limit_changes_the_choice(tmp_path: Path, on: Any) -> None:
    on("8xA100-40GB")
    free, tight = (
        choose(recipe_with(tmp_path, training=training), SourceMap(), MACHINE, 8).recipe.training
        for training in ({}, {"memory_limit": "20GiB"})
    )
    assert isinstance(free.micro_batch_tokens, int)
    assert isinstance(tight.micro_batch_tokens, int)
    assert (tight.micro_batch_tokens, tight.activation_checkpointing) != (
        free.micro_batch_tokens,
        free.activation_checkpointing,
    )


def test_where_nothing_fits_the_run_is_refused_with_what_would(tmp_path: Path, on: Any) -> None:
    on("T4")
    with pytest.raises(
        OutOfMemoryError, match=r"^nothing fits: .* What would fit: .* To try all the same, set"
    ) as error:
        choose(recipe_with(tmp_path, strategy="zero2"), SourceMap(), MACHINE, 1)
    assert error.value.exit_status == 4


def test_what_the_recipe_fixes_wholly_is_tried_all_the_same(tmp_path: Path, on: Any) -> None:
    on("T4")
    recipe = recipe_with(tmp_path, strategy="ddp", training=FIXED)
    chosen = choose(recipe, SourceMap(), MACHINE, 1)
    assert chosen.recipe.strategy == recipe.strategy
    assert chosen.lines[-1].startswith("memory: by the plan nothing fits: ddp ")
    assert chosen.lines[-1].endswith("It is tried all the same, since the recipe leaves no choice.")


def test_an_unknown_model_gets_the_usual_and_the_line_says_why(tmp_path: Path, on: Any) -> None:
    on("8xA100-40GB")
    recipe = recipe_with(tmp_path, {"model_type": "marvellous", "hidden_size": 8})
    chosen = choose(recipe, SourceMap(), MACHINE, 8)
    assert chosen.recipe.training.micro_batch_tokens == 8192
    assert chosen.lines[0].startswith("auto: fsdp, micro-batches of 8,192 tokens, no activation checkpointing, bf16: ")
    assert "not planned, for " in chosen.lines[0]
    assert "marvellous" in chosen.lines[0]


def test_no_strategy_is_taken_that_lacks_what_it_needs(
    tmp_path: Path, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("8xA100-40GB")
    recipe = recipe_with(tmp_path, training={"activation_checkpointing": "none"})

    def rows() -> dict[str, str | None]:
        plan = planning.plan_for(recipe, SourceMap(), parse_hardware("8xA100-40GB"), here=True)
        assert plan.chosen is None or plan.chosen.reason is None
        return {row.name: row.reason for row in plan.rows if isinstance(row.strategy, DeepSpeed)}

    monkeypatch.setattr(planning, "which", lambda _: None)
    reasons = rows()
    assert "no C++ compiler" in str(reasons["zero3-offload"])
    assert "compiler" not in str(reasons["zero3"])
    monkeypatch.setattr(planning, "find_spec", lambda _: None)
    assert all("DeepSpeed is not installed" in str(reason) for reason in rows().values())


def test_a_run_that_goes_on_takes_what_it_took_while_that_fits(tmp_path: Path, on: Any) -> None:
    on("8xA100-40GB")
    recipe = recipe_with(tmp_path)
    training = {**FIXED, "activation_checkpointing": "full", "precision": "fp16"}
    strategy = {"kind": "deepspeed", "stage": 3, "buckets": "small"}
    before = begun(recipe_with(tmp_path, strategy=strategy, cluster={"processes": 8}, training=training))
    earlier = find_earlier(recipe, overwrite=False)
    assert earlier is not None
    assert earlier.recipe == before

    again = choose(recipe, SourceMap(), MACHINE, 8, earlier=earlier)
    assert (again.recipe.strategy, again.recipe.training) == (before.strategy, before.training)
    assert again.lines[0].endswith(": as this run began")
    assert again.lines[0].startswith("auto: zero3 with small buckets, ")
    named = choose(recipe_with(tmp_path, strategy="zero3"), SourceMap(), MACHINE, 8, earlier=earlier)
    assert (named.recipe.strategy, named.recipe.training) == (before.strategy, before.training)

    elsewhere = choose(recipe, SourceMap(), MACHINE, 4, earlier=earlier)  # other processes: only precision stays
    assert elsewhere.recipe.training.precision == "fp16"
    assert "the fastest that fits" in elsewhere.lines[0]

    other = recipe_with(tmp_path, strategy="fsdp")  # what is said now comes first
    assert choose(other, SourceMap(), MACHINE, 8, earlier=earlier).recipe.strategy == other.strategy
    less = recipe_with(tmp_path, training={"memory_limit": "16GiB"})
    assert "the fastest that fits" in choose(less, SourceMap(), MACHINE, 8, earlier=earlier).lines[0]

    assert find_earlier(recipe, overwrite=True) is None
    never = recipe_with(tmp_path, checkpoint={"resume": "never"})
    assert find_earlier(never, overwrite=False) is None
