"""What `auto` comes to: a plan's choice, or the usual one where there is no plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from understudy.plan.estimate import usual_precision
from understudy.plan.hardware.hardware import parse_hardware
from understudy.plan.machine import Machine
from understudy.plan.outcome import Plan
from understudy.plan.resolve import resolve
from understudy.plan.search import best
from understudy.plan.shape.model import model_shape
from understudy.recipe.rules import check
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap

pytestmark = pytest.mark.unit

CPU = Machine(devices=0, device_bytes=16 << 30, cores=6)
GPUS = Machine(devices=8, device_bytes=80 << 30, cores=64)
SMALL = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


def recipe_with(**sections: Any) -> Recipe:
    values = {"name": "r", "output_dir": "o", "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}}
    return Recipe.model_validate({**values, **sections})


def plan_on(hardware: str, recipe: Recipe) -> Plan:
    return best(recipe, parse_hardware(hardware), model_shape(SMALL))


@pytest.mark.parametrize(
    ("machine", "processes", "strategy", "tokens"),
    [(CPU, 1, "ddp", 2048), (CPU, 2, "ddp", 2048), (GPUS, 1, "ddp", 8192), (GPUS, 8, "fsdp", 8192)],
)
def test_without_a_plan_auto_follows_the_machine(machine: Machine, processes: int, strategy: str, tokens: int) -> None:
    resolved, choices = resolve(recipe_with(), machine, processes, "bf16", why="not known")
    assert not isinstance(resolved.strategy, str)
    assert resolved.strategy.kind == strategy
    assert resolved.training.precision == "bf16"
    assert resolved.training.micro_batch_tokens == tokens
    assert resolved.training.activation_checkpointing == "none"
    assert resolved.data.num_workers == machine.cores
    assert resolved.cluster.processes == processes
    assert choices == (
        f"{strategy}, micro-batches of {tokens:,} tokens, no activation checkpointing, bf16: not known",
        f"data.num_workers: {machine.cores}, one a core",
        f"cluster.processes: {processes}",
    )


def test_a_micro_batch_has_room_for_the_longest_example() -> None:
    recipe = recipe_with(data={"train": [{"path": "a"}], "max_length": 5000})
    assert resolve(recipe, CPU, 1, "fp32")[0].training.micro_batch_tokens == 5000


@pytest.mark.parametrize("hardware", ["8xA100-80GB", "8xRTX-3090", "2xcpu:64GiB"])
def test_auto_is_what_the_plan_takes_and_one_line_says_so(hardware: str) -> None:
    plan = plan_on(hardware, recipe_with())
    row = plan.chosen
    assert row is not None
    resolved, choices = resolve(recipe_with(), GPUS, 8, plan.precision, plan)
    training = resolved.training
    assert resolved.strategy == row.strategy
    assert (training.micro_batch_tokens, training.activation_checkpointing, training.precision) == (
        row.micro_batch_tokens,
        row.activation_checkpointing,
        plan.precision,
    )
    planned = f"{row.device_peak_bytes / 2**30:,.1f} GiB planned"
    assert choices[0].startswith(f"{row.name}, micro-batches of {row.micro_batch_tokens:,} tokens, ")
    assert f"{plan.precision}: the fastest that fits {plan.limit_bytes / 2**30:,.1f} GiB ({planned}, " in choices[0]


def test_what_the_user_chose_is_kept() -> None:
    resolved, _ = resolve(recipe_with(), GPUS, 8, "bf16")
    plan = replace(plan_on("8xA100-80GB", resolved))
    assert resolve(resolved, CPU, 8, "fp32", plan) == (resolved, ())


def test_resolving_changes_nothing_but_what_was_auto() -> None:
    recipe = recipe_with(training={"max_steps": 5, "precision": "fp16"}, strategy="zero2")
    resolved, choices = resolve(recipe, GPUS, 8, "bf16", plan_on("8xA100-80GB", recipe))
    assert (
        resolved.training.model_copy(update={"micro_batch_tokens": "auto", "activation_checkpointing": "auto"})
        == recipe.training
    )
    assert "epochs" not in resolved.training.model_fields_set
    assert choices[0].startswith("micro-batches of ")
    assert "fp16" not in choices[0]


@pytest.mark.parametrize(
    ("config", "on_cpu", "on_gpus"),
    [
        ({"bf16": {"enabled": True}}, "bf16", "bf16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": "auto"}}, "fp16", "fp16"),
        ({"bf16": {"enabled": False}}, "fp32", "fp32"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}}, "fp32", "bf16"),
    ],
)
def test_automatic_precision_follows_the_deepspeed_file(
    tmp_path: Path, config: dict[str, Any], on_cpu: str, on_gpus: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    recipe = recipe_with(strategy={"kind": "deepspeed", "config": str(path)})
    for name, machine, expected in (("cpu:16GiB", CPU, on_cpu), ("8xA100-80GB", GPUS, on_gpus)):
        precision = usual_precision(recipe, parse_hardware(name))
        resolved, _ = resolve(recipe, machine, 1, precision)
        assert resolved.training.precision == expected
        check(resolved, SourceMap())


def test_a_device_without_units_for_bf16_computes_in_fp16() -> None:
    assert usual_precision(recipe_with(), parse_hardware("T4")) == "fp16"
