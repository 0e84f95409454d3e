"""The plan of a recipe: its model's and its teachers' shapes, and a machine, put together for the planner. No torch."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from understudy.devices.detect import accelerator_name, detect_machine
from understudy.devices.host_memory import usable_memory_bytes
from understudy.models.source import cached_config_file, read_config
from understudy.plan.hardware.hardware import Hardware, local_hardware, parse_hardware
from understudy.plan.outcome import Plan
from understudy.plan.pruned import student_config
from understudy.plan.search import best
from understudy.plan.shape.model import ModelShape, model_shape
from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import Model, Recipe
from understudy.recipe.sizes import limited_bytes
from understudy.recipe.source_map import SourceMap
from understudy.recipe.teachers import CachedTeacher, LocalTeacher, ResidentTeacher

__all__ = ["asked_hardware", "plan_for"]


def plan_for(recipe: Recipe, sources: SourceMap, hardware: Hardware, *, levers: bool = True) -> Plan:
    """What fits of `recipe` on `hardware`, within its `training.memory_limit`, and what is fastest.

    With `levers` a plan in which nothing fits says what would. Raises `UserError` at the recipe's line where the
    planner does not know the model.
    """
    with sources.placing("model.path" if recipe.model.path else "model.config"):
        shape = model_shape(student_config(_config(recipe.model), recipe.model))
    usable = hardware.accelerator.usable_bytes
    limit = limited_bytes(recipe.training.memory_limit, hardware.accelerator.device_bytes)
    with sources.placing("model.path"):
        return best(
            recipe,
            hardware,
            shape,
            teachers=_teachers(recipe, sources),
            limit_bytes=usable if limit is None else min(limit, usable),
            levers=levers,
        )


def asked_hardware(recipe: Recipe, named: str | None = None, nodes: int = 1) -> Hardware:
    """`nodes` hosts as `named`, or this machine's like when that is None, with as many devices as the recipe uses.
    Raises `UserError` for a name that the catalogue does not know."""
    asked = recipe.cluster.processes
    processes = None if asked == "auto" else asked
    if named is not None:
        found = parse_hardware(named, nodes=nodes, processes=processes)
    else:
        machine = detect_machine()
        name, room = accelerator_name() if machine.accelerated else "", usable_memory_bytes()
        found = local_hardware(name, machine.devices, machine.device_bytes, room, machine.cores, processes)
        found = replace(found, nodes=nodes)
    if not _teacher_apart(recipe):
        return found
    # Each process has two devices: its own, and its teacher's.
    used = min(processes or found.devices_per_node, max(1, found.devices_per_node // 2))
    return replace(found, devices_per_node=used)


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
                shapes.append(model_shape(_config(Model(path=section.path, revision=section.revision))))
            else:
                shapes.append(None)
    return shapes


def _config(model: Model) -> dict[str, Any]:
    """The model's configuration, from this machine's cache where it is there."""
    if (file := cached_config_file(model)) is not None:
        return {**json.loads(file.read_text(encoding="utf-8")), **model.config}
    return read_config(model)
