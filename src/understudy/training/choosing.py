"""What a recipe's `auto` comes to in a run: the planner's choice for the machine it runs on. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from understudy.checkpoint.manifest import DamagedCheckpointError
from understudy.checkpoint.places import examine
from understudy.checkpoint.progress import read_progress
from understudy.errors import OutOfMemoryError, UserError
from understudy.launch.run_directory import RunDirectory
from understudy.plan.estimate import usual_precision
from understudy.plan.machine import Machine
from understudy.plan.outcome import Plan
from understudy.plan.resolve import planned_fields, resolve
from understudy.recipe.schema import DeepSpeed, Recipe
from understudy.recipe.source_map import SourceMap
from understudy.recipe.yaml_text import CoreLoader
from understudy.training.planning import find_shapes, hardware_here, plan_for

__all__ = ["Chosen", "Earlier", "choose", "choose_as_usual", "find_earlier"]


@dataclass(frozen=True)
class Chosen:
    recipe: Recipe
    """Without `auto`."""
    lines: tuple[str, ...]
    """For the log: what was chosen and why, and what speaks against it."""


@dataclass(frozen=True)
class Earlier:
    """What is known of the run that is to go on."""

    precision: str | None
    recipe: Recipe | None
    """As it was resolved; None where it was in another run directory."""


def choose(
    recipe: Recipe,
    sources: SourceMap,
    machine: Machine,
    processes: int,
    *,
    nodes: int = 1,
    earlier: Earlier | None = None,
) -> Chosen:
    """What the planner takes for `processes` on `nodes` hosts like this `machine`; what the recipe fixes is kept.

    A run that goes on keeps the precision in which it began, and the rest too where as many processes run it and it
    still fits. Where the planner does not know the model, the usual is taken. Raises `OutOfMemoryError` when nothing
    fits, unless the recipe fixes all that could be changed: a plan is an estimate.
    """
    hardware = hardware_here(recipe, machine, -(-processes // nodes), nodes)
    precision = _precision_of(recipe, earlier) or usual_precision(recipe, hardware)
    settled = _with(recipe, precision=precision)
    before = _as_before(settled, earlier, processes)
    try:
        shapes = find_shapes(recipe, sources)
        plan = plan_for(before or settled, sources, hardware, here=True, shapes=shapes, levers=before is None)
        if plan.chosen is None and before is not None:
            before, plan = None, plan_for(settled, sources, hardware, here=True, shapes=shapes)
    except UserError as unknown:
        lines = resolve(
            recipe, machine, processes, precision, nodes=nodes, why=f"as usual; not planned, for {_clause(unknown)}"
        )
        return _chosen(*lines)
    if plan.chosen is None:
        return _chosen(*resolve(recipe, machine, processes, precision, nodes=nodes), _tried_all_the_same(settled, plan))
    why = "" if before is None else "as this run began"
    return _chosen(*resolve(recipe, machine, processes, precision, plan, nodes=nodes, why=why))


def choose_as_usual(recipe: Recipe, machine: Machine, processes: int, *, nodes: int = 1) -> Chosen:
    """Without a plan: for what does not train, and for a process whose choice does not count."""
    precision = usual_precision(recipe, hardware_here(recipe, machine, -(-processes // nodes), nodes))
    return _chosen(*resolve(recipe, machine, processes, precision, nodes=nodes))


def find_earlier(recipe: Recipe, *, overwrite: bool) -> Earlier | None:
    """The run that `recipe` would go on with; None where it begins anew. Whether it may go on is not judged."""
    resume = recipe.checkpoint.resume
    if resume == "never":
        return None
    known = None if overwrite else _resolved_in(RunDirectory(Path(recipe.output_dir)))
    if resume != "auto":
        return Earlier(_precision_in(Path(resume)), known)
    return None if known is None else Earlier(known.training.precision, known)


def _resolved_in(directory: RunDirectory) -> Recipe | None:
    try:
        return Recipe.model_validate(yaml.load(directory.recipe.read_text(encoding="utf-8"), CoreLoader))
    except (OSError, ValueError, yaml.YAMLError):  # none, or one of another release
        return None


def _precision_in(checkpoint: Path) -> str | None:
    try:
        found = examine(checkpoint).checkpoints
        return str(read_progress(found[0]).recipe["training.precision"]) if found else None
    except (UserError, DamagedCheckpointError, KeyError):  # refused later, at its line, or imported
        return None


def _precision_of(recipe: Recipe, earlier: Earlier | None) -> str | None:
    return earlier.precision if earlier is not None and recipe.training.precision == "auto" else None


def _as_before(recipe: Recipe, earlier: Earlier | None, processes: int) -> Recipe | None:
    """`recipe` with what the earlier run took; None where the two are not alike in all that the recipe fixes."""
    before = None if earlier is None else earlier.recipe
    if before is None or before.cluster.world_size != processes or not planned_fields(recipe):
        return None
    ours, theirs = _fields(recipe), _fields(before)
    own, then = ours["strategy"], theirs["strategy"]
    if isinstance(own, DeepSpeed) and isinstance(then, DeepSpeed) and own.buckets == "auto":
        ours["strategy"] = own.model_copy(update={"buckets": then.buckets})
    if any(value not in ("auto", theirs[name]) for name, value in ours.items()):
        return None
    training = {name: value for name, value in theirs.items() if name != "strategy"}
    return _with(recipe.model_copy(update={"strategy": theirs["strategy"]}), **training)


def _fields(recipe: Recipe) -> dict[str, Any]:
    training = recipe.training
    return {
        "strategy": recipe.strategy,
        "micro_batch_tokens": training.micro_batch_tokens,
        "activation_checkpointing": training.activation_checkpointing,
        "precision": training.precision,
    }


def _tried_all_the_same(recipe: Recipe, plan: Plan) -> str:
    lever = f" What would fit: {plan.lever}" if plan.lever else ""
    if planned_fields(recipe):
        raise OutOfMemoryError(
            f"{plan.why}{lever} To try all the same, set `strategy`, `training.micro_batch_tokens` and "
            "`training.activation_checkpointing`."
        )
    return f"memory: by the plan {plan.why}{lever} It is tried all the same, since the recipe leaves no choice."


def _chosen(recipe: Recipe, choices: tuple[str, ...], *others: str) -> Chosen:
    return Chosen(recipe, (*(f"auto: {choice}" for choice in choices), *others))


def _clause(error: UserError) -> str:
    return error.message.rstrip(".")


def _with(recipe: Recipe, **training: Any) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})
