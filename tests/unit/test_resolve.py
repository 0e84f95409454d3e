"""What `auto` comes to is a function of the machine and the number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from understudy.plan.machine import Machine
from understudy.plan.resolve import resolve
from understudy.recipe.rules import check
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap

pytestmark = pytest.mark.unit

CPU = Machine(devices=0, device_bytes=16 << 30, cores=6)
GPUS = Machine(devices=8, device_bytes=80 << 30, cores=64)


def recipe_with(**sections: Any) -> Recipe:
    values = {"name": "r", "output_dir": "o", "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}}
    return Recipe.model_validate({**values, **sections})


@pytest.mark.parametrize(
    ("machine", "processes", "strategy", "precision", "tokens"),
    [
        (CPU, 1, "ddp", "fp32", 2048),
        (CPU, 2, "ddp", "fp32", 2048),
        (GPUS, 1, "ddp", "bf16", 8192),
        (GPUS, 8, "fsdp", "bf16", 8192),
    ],
)
def test_auto_follows_the_machine(machine: Machine, processes: int, strategy: str, precision: str, tokens: int) -> None:
    resolved, choices = resolve(recipe_with(), machine, processes)
    assert not isinstance(resolved.strategy, str)
    assert resolved.strategy.kind == strategy
    assert resolved.training.precision == precision
    assert resolved.training.micro_batch_tokens == tokens
    assert resolved.training.activation_checkpointing == "none"
    assert resolved.data.num_workers == machine.cores
    assert resolved.cluster.processes == processes
    assert [choice.split(":")[0] for choice in choices] == [
        "training.precision",
        "training.micro_batch_tokens",
        "training.activation_checkpointing",
        "strategy",
        "data.num_workers",
        "cluster.processes",
    ]


def test_a_micro_batch_has_room_for_the_longest_example() -> None:
    recipe = recipe_with(data={"train": [{"path": "a"}], "max_length": 5000})
    assert resolve(recipe, CPU, 1)[0].training.micro_batch_tokens == 5000


def test_what_the_user_chose_is_kept() -> None:
    resolved, _ = resolve(recipe_with(), GPUS, 8)
    assert resolve(resolved, CPU, 8) == (resolved, ())


def test_resolving_changes_nothing_but_what_was_auto() -> None:
    recipe = recipe_with(training={"max_steps": 5, "precision": "fp16"}, strategy="zero2")
    resolved, choices = resolve(recipe, CPU, 2)
    assert resolved.strategy == recipe.strategy
    assert (resolved.training.max_steps, resolved.training.precision) == (5, "fp16")
    assert "epochs" not in resolved.training.model_fields_set
    assert not any(choice.startswith(("strategy", "training.precision")) for choice in choices)


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
    for machine, expected in ((CPU, on_cpu), (GPUS, on_gpus)):
        resolved, _ = resolve(recipe, machine, 1)
        assert resolved.training.precision == expected
        check(resolved, SourceMap())
