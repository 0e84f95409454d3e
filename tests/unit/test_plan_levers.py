"""What `plan` says to change where nothing fits, and what it counts of settings that only some rows have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_plan_command import LLAMA_1B, LLAMA_8B, SMALL, run, write_model
from understudy.plan.hardware.hardware import Hardware, parse_hardware
from understudy.plan.outcome import Plan
from understudy.plan.search import best
from understudy.plan.shape.model import model_shape
from understudy.recipe.presets import STRATEGY_PRESETS
from understudy.recipe.schema import Recipe

pytestmark = pytest.mark.unit
__all__ = ["run"]


def plan_of(
    config: dict[str, Any],
    hardware: Hardware | str,
    teachers: Sequence[Any] = (),
    limit_bytes: int | None = None,
    **sections: Any,
) -> Plan:
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "output_dir": "o",
            "model": {"path": "m"},
            "data": {"train": [{"path": "a"}], "max_length": 1024},
            **sections,
        }
    )
    machine = parse_hardware(hardware) if isinstance(hardware, str) else hardware
    return best(recipe, machine, model_shape(config), teachers=teachers, limit_bytes=limit_bytes)


@pytest.mark.parametrize(
    ("hardware", "said"),
    [
        ("4xT4", "set `kind: sharded` in `objective.teacher`"),
        ("T4", "set `kind: resident` and `quantization: {bits: 4}` in `objective.teacher`"),
        ("2xcpu:9GiB", "set `kind: cache` in `objective.teacher`"),
    ],
)
def test_a_teacher_that_is_too_large_is_told_to_be_held_otherwise(hardware: str, said: str) -> None:
    objective = {"kind": "distillation", "teacher": {"kind": "resident", "path": "t"}}
    plan = plan_of(LLAMA_1B, hardware, (model_shape(LLAMA_8B),), objective=objective, adapter="lora")
    assert plan.chosen is None
    assert plan.lever is not None
    assert said in plan.lever


def test_several_teachers_are_held_otherwise_together() -> None:
    teacher = {"kind": "resident", "path": "t"}
    objective = {"kind": "distillation", "teacher": {"kind": "several", "teachers": [teacher, teacher]}}
    plan = plan_of(LLAMA_1B, "8xA10", (model_shape(LLAMA_8B),) * 2, objective=objective, adapter="lora")
    assert plan.lever is not None
    assert "in each of `objective.teacher.teachers`" in plan.lever


def test_a_limit_that_is_too_low_is_to_be_raised_as_far_as_it_takes() -> None:
    training = {"memory_limit": "20MiB", "global_batch_size": 8}
    plan = plan_of(SMALL, "2xcpu:8GiB", limit_bytes=20 * 2**20, training=training, strategy="ddp")
    assert plan.chosen is None
    assert "20 MiB" in plan.why
    assert plan.lever is not None
    said = plan.lever.partition("raise `training.memory_limit` to ")[2].partition("GiB")[0]
    enough = int(float(said) * 2**30)
    assert plan_of(SMALL, "2xcpu:8GiB", limit_bytes=enough, training=training, strategy="ddp").chosen is not None
    less = enough - 2**30 // 5
    assert plan_of(SMALL, "2xcpu:8GiB", limit_bytes=less, training=training, strategy="ddp").chosen is None


def test_examples_are_shortened_no_further_than_it_takes() -> None:
    def planned(length: int) -> Plan:
        data = {"train": [{"path": "a"}], "max_length": length}
        return plan_of(LLAMA_8B, "4xA100-40GB", data=data, training={"global_batch_size": 64})

    plan = planned(131072)
    assert plan.lever is not None
    length = int(plan.lever.partition("set `data.max_length: ")[2].partition("`")[0])
    assert planned(length).chosen is not None
    assert planned(length * 9 // 8).chosen is None


def test_replicas_of_one_strategy_do_not_rule_out_the_rows_of_others() -> None:
    hybrid = {"kind": "fsdp", "sharding": "hybrid_shard"}
    sections: dict[str, Any] = {"strategy": hybrid, "parallel": {"replicate": 2}}
    plan = plan_of(LLAMA_1B, "8xA100-80GB", training={"global_batch_size": 64}, **sections)
    assert plan.chosen is plan.rows[-1]
    assert len(plan.rows) == len(STRATEGY_PRESETS) + 1
    assert not any(row.refused for row in plan.rows)
    small = plan_of(LLAMA_8B, "8xRTX-4090", training={"global_batch_size": 64}, **sections)
    assert small.lever is not None
    assert "set `strategy: auto` without `parallel.replicate`" in small.lever


def test_what_goes_to_a_disk_takes_no_host_memory() -> None:
    training = {"global_batch_size": 64}
    both = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": "/disk"}
    disk = plan_of(LLAMA_8B, "2xA100-80GB", strategy={"kind": "deepspeed", "stage": 3, **both}, training=training).rows[
        -1
    ]
    plan = plan_of(LLAMA_8B, "2xA100-80GB", strategy="zero3-offload", training=training)
    host = next(one for one in plan.rows if one.name == "zero3-offload")
    count = model_shape(LLAMA_8B).count
    # Weights in bf16; master weights, two moments and a gradient in fp32.
    assert disk.disk_bytes == pytest.approx(18 * count, rel=0.01)
    assert host.disk_bytes == 0
    assert disk.host_peak_bytes < 0.5 * host.host_peak_bytes
    assert plan.to_json()["strategies"][0]["disk_bytes"] == 0


def test_the_recipes_processes_are_a_part_of_the_named_devices(run: Any) -> None:
    status, out, _ = run(SMALL, "--hardware", "8xA100-80GB", "--json", cluster={"processes": 4})
    assert status == 0
    assert '"devices": 4' in out
    status, out, err = run(SMALL, "--hardware", "2xA100-80GB", cluster={"processes": 4})
    assert (status, out) == (2, "")
    assert "`cluster.processes`" in err


def test_a_teacher_without_sizes_is_named(run: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "t", {"model_type": "llama"})
    objective = {"kind": "distillation", "teacher": {"kind": "resident", "path": str(tmp_path / "t")}}
    status, _, err = run(SMALL, "--hardware", "A100-80GB", objective=objective)
    assert status == 2
    assert "the teacher's configuration" in err
    assert "model.config" not in err


@pytest.mark.parametrize(
    "section",
    [
        '"reduce_bucket_size": -5',
        '"reduce_bucket_size": "foo"',
        '"stage3_max_live_parameters": 1.5',
        '"allgather_bucket_size": true',
        '"offload_param": {"device": "cpu", "buffer_count": 0}',
    ],
)
def test_numbers_of_a_deepspeed_file_that_are_none_are_refused_at_their_line(
    run: Any, tmp_path: Path, section: str
) -> None:
    (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {{\n"stage": 3,\n{section}}}}}')
    strategy = {"kind": "deepspeed", "config": str(tmp_path / "ds.json")}
    status, out, err = run(SMALL, "--hardware", "2xA100-80GB", strategy=strategy)
    assert (status, out) == (2, "")
    assert "ds.json:3: `zero_optimization." in err
    assert "must be a whole number" in err


def test_numbers_of_a_deepspeed_file_may_be_written_with_exponents(run: Any, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8}}')
    strategy = {"kind": "deepspeed", "config": str(tmp_path / "ds.json")}
    assert run(SMALL, "--hardware", "2xA100-80GB", strategy=strategy)[0] == 0
