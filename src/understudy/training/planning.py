"""The plan of a recipe: its model's and its teachers' shapes, and a machine, put together for the planner. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from shutil import which
from typing import Any

from understudy.devices.detect import accelerator_name, detect_machine
from understudy.devices.host_memory import available_memory_bytes, usable_memory_bytes
from understudy.models.source import cached_config_file, read_config
from understudy.plan.hardware.hardware import Hardware, local_hardware, parse_hardware
from understudy.plan.machine import Machine
from understudy.plan.outcome import Plan
from understudy.plan.pruned import student_config
from understudy.plan.search import best
from understudy.plan.shape.model import ModelShape, model_shape
from understudy.recipe.deepspeed_file import effective_deepspeed
from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import DDP, FSDP, DeepSpeed, Model, Recipe
from understudy.recipe.sizes import limited_bytes
from understudy.recipe.source_map import SourceMap
from understudy.recipe.teachers import CachedTeacher, LocalTeacher, ResidentTeacher

__all__ = ["Shapes", "asked_hardware", "find_shapes", "hardware_here", "plan_for"]

_LEFT_FREE = 0.1
"""Share of a host's free memory that a plan for its processor leaves to others, who take some as time passes."""


@dataclass(frozen=True)
class Shapes:
    """Of a recipe's models, from their configurations."""

    student: ModelShape
    teachers: tuple[ModelShape | None, ...]
    """Of each teacher that is a model of its own here, in the recipe's order."""


def plan_for(
    recipe: Recipe,
    sources: SourceMap,
    hardware: Hardware,
    *,
    here: bool = False,
    shapes: Shapes | None = None,
    levers: bool = True,
) -> Plan:
    """What fits of `recipe` on `hardware`, within its `training.memory_limit`, and what is fastest.

    `here` says that it is this machine, on which no strategy is taken that lacks what it needs. `shapes` are found when
    None. With `levers` a plan in which nothing fits says what would. Raises `UserError` at the recipe's line where the
    planner does not know the model.
    """
    shapes = shapes or find_shapes(recipe, sources)
    usable = hardware.accelerator.usable_bytes
    limit = limited_bytes(recipe.training.memory_limit, hardware.accelerator.device_bytes)
    if limit is not None and not hardware.accelerated:
        # What a processor's process puts aside in host memory is its own too.
        bounded = min(limit * hardware.devices_per_node, hardware.host_bytes)
        hardware = replace(hardware, host_bytes=bounded)
    with sources.placing("model.path"):
        return best(
            recipe,
            hardware,
            shapes.student,
            teachers=shapes.teachers,
            limit_bytes=usable if limit is None else min(limit, usable),
            lacking=partial(_lacking, accelerated=hardware.accelerated) if here else None,
            levers=levers,
        )


def find_shapes(recipe: Recipe, sources: SourceMap) -> Shapes:
    """Of the recipe's models; a configuration that is not on this machine is downloaded. Raises `UserError` at the
    recipe's line where the planner does not know a model."""
    with sources.placing("model.path" if recipe.model.path else "model.config"):
        student = model_shape(student_config(_config(recipe.model), recipe.model))
    return Shapes(student, tuple(_teachers(recipe, sources)))


def asked_hardware(recipe: Recipe, named: str | None = None, nodes: int = 1) -> Hardware:
    """`nodes` hosts as `named`, or this machine's like when that is None, with as many devices as the recipe uses.
    Raises `UserError` for a name that the catalogue does not know."""
    asked = recipe.cluster.processes
    processes = None if asked == "auto" else asked
    if named is None:
        return hardware_here(recipe, detect_machine(), processes, nodes)
    devices = 2 * processes if processes and _teacher_apart(recipe) else processes
    return _students_own(parse_hardware(named, nodes=nodes, processes=devices), recipe, processes)


def hardware_here(recipe: Recipe, machine: Machine, processes: int | None, nodes: int = 1) -> Hardware:
    """This machine, of which `processes` are used, one a device when None, and so many hosts like it.

    Of a processor's memory a plan may have what is free now, less a reserve: others hold the rest.
    """
    name, total = accelerator_name() if machine.accelerated else "", usable_memory_bytes()
    free = int((1 - _LEFT_FREE) * min(total, available_memory_bytes() or total))
    found = local_hardware(
        name, machine.devices, machine.device_bytes, total, machine.cores, processes, free_bytes=free
    )
    return _students_own(replace(found, nodes=nodes), recipe, processes)


def _lacking(strategy: DDP | FSDP | DeepSpeed, precision: str, *, accelerated: bool) -> str | None:
    """What `strategy` needs and this machine has not; None where it can run."""
    if not isinstance(strategy, DeepSpeed):
        return None
    if find_spec("deepspeed") is None:
        return "DeepSpeed is not installed: run `pip install 'understudy[deepspeed]'`"
    if precision == "fp16" and not accelerated:
        return "DeepSpeed does not train in fp16 on a processor"
    # Its collectives on a processor, and the optimizer that steps in host memory, are compiled at their first use.
    compiled = not accelerated or effective_deepspeed(strategy).offload_optimizer != "none"
    if compiled and not any(map(which, ("c++", "g++", "clang++"))):
        return "DeepSpeed compiles operators for it, and there is no C++ compiler here"
    return None


def _students_own(hardware: Hardware, recipe: Recipe, processes: int | None) -> Hardware:
    """`hardware` without the devices that teachers have for themselves."""
    if not _teacher_apart(recipe):
        return hardware
    # Each process has two devices: its own, and its teacher's.
    used = min(processes or hardware.devices_per_node, max(1, hardware.devices_per_node // 2))
    return replace(hardware, devices_per_node=used)


def _teacher_apart(recipe: Recipe) -> bool:
    if not isinstance(recipe.objective, Distillation):
        return False
    return any(isinstance(one, ResidentTeacher) and one.device == "other" for one in recipe.objective.teachers)


def _teachers(recipe: Recipe, sources: SourceMap) -> list[ModelShape | None]:
    """Of each teacher that is a model of its own here, its shape."""
    if not isinstance(recipe.objective, Distillation):
        return []
    shapes: list[ModelShape | None] = []
    for section in recipe.objective.teachers:
        with sources.placing("objective.teacher"):
            answers = isinstance(section, CachedTeacher) and section.targets != "hidden"
            if isinstance(section, LocalTeacher) and not answers:
                shapes.append(
                    model_shape(_config(Model(path=section.path, revision=section.revision)), teacher=section.path)
                )
            else:
                shapes.append(None)
    return shapes


def _config(model: Model) -> dict[str, Any]:
    """The model's configuration, from this machine's cache where it is there."""
    if (file := cached_config_file(model)) is not None:
        return {**json.loads(file.read_text(encoding="utf-8")), **model.config}
    return read_config(model)
