"""Predict memory and speed of a recipe under every strategy, and say what fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from understudy.cli.arguments import recipe_arguments

if TYPE_CHECKING:
    from understudy.plan.hardware.hardware import Hardware
    from understudy.plan.shape.model import ModelShape
    from understudy.recipe.schema import Model, Recipe
    from understudy.recipe.source_map import SourceMap


@click.command
@recipe_arguments
@click.option(
    "--hardware",
    metavar="[N x]NAME",
    help="Devices of one host, such as 8xA100-80GB, 4x910B-64GB or cpu:24GiB.  [default: this machine]",
)
@click.option("--nodes", type=click.IntRange(1, 1024), default=1, show_default=True, help="Hosts with such devices.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the memory of each strategy: .html or .png.",
)
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    hardware: str | None,
    nodes: int,
    as_json: bool,
    picture: Path | None,
) -> None:
    """Predict memory and speed of RECIPE under every strategy, from the model's configuration alone: what fits, how
    large a micro-batch may be, how fast it goes and what it waits for.

    What the recipe fixes (strategy, training.micro_batch_tokens, training.activation_checkpointing) is kept; the rest
    is searched for the fastest that fits. Nothing is downloaded but the model's config.json.

    Example: understudy plan recipe.yaml --hardware 8xA100-80GB --picture plan.html
    """
    from understudy.plan.report import report_lines
    from understudy.plan.search import best
    from understudy.recipe.load import load_recipe
    from understudy.recipe.rules import check_processes

    loaded, sources = load_recipe(recipe, overrides)
    machine = _hardware(loaded, hardware, nodes)
    check_processes(loaded, machine.devices, sources)
    shape = _student(loaded, sources)
    with sources.placing("model.path"):
        plan = best(loaded, machine, shape, teachers=_teachers(loaded, sources))
    if picture is not None:
        from understudy.plan.picture import write_picture

        write_picture(plan, picture)
    if as_json:
        click.echo(json.dumps(plan.to_json()))
        return
    for line in report_lines(plan):
        click.echo(line)


def _hardware(recipe: Recipe, named: str | None, nodes: int) -> Hardware:
    from dataclasses import replace

    from understudy.plan.hardware.hardware import local_hardware, parse_hardware

    asked = recipe.cluster.processes
    processes = None if asked == "auto" else asked
    if named is not None:
        found = parse_hardware(named, nodes=nodes, processes=processes)
    else:
        from understudy.devices.detect import accelerator_name, detect_machine
        from understudy.devices.host_memory import usable_memory_bytes

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
    from understudy.recipe.objectives import Distillation
    from understudy.recipe.teachers import ResidentTeacher

    if not isinstance(recipe.objective, Distillation):
        return False
    return any(isinstance(one, ResidentTeacher) and one.device == "other" for one in recipe.objective.teachers)


def _student(recipe: Recipe, sources: SourceMap) -> ModelShape:
    from understudy.plan.pruned import student_config
    from understudy.plan.shape.model import model_shape

    with sources.placing("model.path" if recipe.model.path else "model.config"):
        return model_shape(student_config(_config(recipe.model), recipe.model))


def _teachers(recipe: Recipe, sources: SourceMap) -> list[ModelShape | None]:
    """Of each teacher that is a model of its own here, its shape."""
    from understudy.plan.shape.model import model_shape
    from understudy.recipe.objectives import Distillation
    from understudy.recipe.schema import Model
    from understudy.recipe.teachers import CachedTeacher, LocalTeacher

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
    from understudy.models.source import cached_config_file, read_config

    if (file := cached_config_file(model)) is not None:
        return {**json.loads(file.read_text(encoding="utf-8")), **model.config}
    return read_config(model)
