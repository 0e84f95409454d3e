"""What follows when a run is out of memory: smaller micro-batches of the same steps, or else what would fit."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from understudy.data.cache import TokenCache
from understudy.errors import UserError
from understudy.launch.cause import Shortage
from understudy.launch.run_directory import replace_file
from understudy.plan.advice import gibibytes
from understudy.plan.machine import Machine
from understudy.plan.outcome import Row
from understudy.recipe.presets import STRATEGY_PRESETS
from understudy.recipe.rules import RULES
from understudy.recipe.schema import Recipe, Training
from understudy.training.job import Job
from understudy.training.planning import hardware_here, plan_for

__all__ = [
    "Lesson",
    "as_learned",
    "learned_from",
    "read_lesson",
    "readable",
    "sizes_in_words",
    "smaller",
    "with_sizes_of",
    "would_fit",
    "write_lesson",
]

_CERTAINLY_LESS = 0.97
"""What a plan may take at most, as a share of what it gave for settings that did not fit: it errs by less."""


@dataclass(frozen=True)
class Lesson:
    """What a run learned about memory; kept in its directory, so that it is learned once."""

    asked: dict[str, Any]
    """Under which settings: `_settings` of the recipe as `auto` left it."""
    ran_out_tokens: int
    """The smallest `micro_batch_tokens` with which memory ran out."""
    micro_batch_tokens: int
    """What to go on with."""
    activation_checkpointing: str


def smaller(job: Job, shortage: Shortage, *, may_checkpoint: bool) -> Recipe | None:
    """The recipe with which to start `job` again: with smaller micro-batches, or else, where `may_checkpoint`, with
    full activation checkpointing. None when nothing is left to try."""
    recipe = job.recipe
    if not shortage.may_have_trained:
        return None
    budget, longest = _budget(recipe), longest_example(job)
    largest = min(budget, shortage.micro_batch_tokens or _most_of_a_step(job))
    # Half a budget that nothing fills would change nothing.
    tokens = max(largest // 2, longest)
    if tokens < largest:
        return _with(recipe, micro_batch_tokens=tokens)
    if may_checkpoint and recipe.training.activation_checkpointing != "full":
        changed = _with(recipe, activation_checkpointing="full")
        if _violations(changed) <= _violations(recipe):
            return changed
    return None


def learned_from(asked: Recipe, machine: Machine, ran_out: Recipe, next_try: Recipe) -> Lesson:
    """`asked` is the recipe that the run began with."""
    return Lesson(
        asked=_settings(asked, machine),
        ran_out_tokens=_budget(ran_out),
        micro_batch_tokens=_budget(next_try),
        activation_checkpointing=next_try.training.activation_checkpointing,
    )


def as_learned(recipe: Recipe, machine: Machine, lesson: Lesson | None) -> Recipe:
    """`recipe` with what an earlier start of its run learned: of the same strategy, processes and limits, and unless it
    asks by itself for less than what ran out."""
    if lesson is None or lesson.asked != _settings(recipe, machine) or _budget(recipe) < lesson.ran_out_tokens:
        return recipe
    return _with(
        recipe,
        micro_batch_tokens=lesson.micro_batch_tokens,
        activation_checkpointing=lesson.activation_checkpointing,
    )


def read_lesson(file: Path) -> Lesson | None:
    """None where no run left one that can be read."""
    try:
        return Lesson(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def with_sizes_of(recipe: Recipe, other: Recipe) -> Recipe:
    """`recipe` with what `other` had in memory at once."""
    training = other.training
    return _with(
        recipe,
        micro_batch_tokens=training.micro_batch_tokens,
        activation_checkpointing=training.activation_checkpointing,
    )


def write_lesson(file: Path, lesson: Lesson) -> None:
    replace_file(file, (json.dumps(asdict(lesson), indent=1) + "\n").encode())


def readable(recipe: Recipe) -> Recipe:
    """`recipe` for people to read and to train again. A recipe must have room in a micro-batch for an example of
    `data.max_length`; where no example is that long, the run may have had less."""
    longest = recipe.data.max_length
    data = recipe.data.model_copy(update={"max_length": min(longest, max(2, _budget(recipe)))})
    return recipe.model_copy(update={"data": data})


def sizes_in_words(recipe: Recipe) -> str:
    words = f"micro-batches of at most {_budget(recipe):,} tokens"
    if recipe.training.activation_checkpointing != "none":
        words += f" and activation_checkpointing {recipe.training.activation_checkpointing}"
    return words


def would_fit(job: Job, machine: Machine) -> str:
    """A sentence: what the planner knows to take less than what ran out, `job`."""
    recipe, sources, longest = job.recipe, job.sources, max(2, longest_example(job))
    data = recipe.data.model_copy(update={"max_length": min(recipe.data.max_length, longest)})
    recipe = recipe.model_copy(update={"data": data})
    try:
        processes = recipe.cluster.processes
        per_host = None if processes == "auto" else processes
        hardware = hardware_here(recipe, machine, per_host, recipe.cluster.nodes)
        tried = plan_for(recipe, sources, hardware, here=True, levers=False)
        row = next(row for row in tried.rows if _without_buckets(row.strategy) == _without_buckets(recipe.strategy))
        limit = min(tried.limit_bytes, int(_CERTAINLY_LESS * row.device_peak_bytes))
        free = {"micro_batch_tokens": "auto", "activation_checkpointing": "auto", "memory_limit": f"{limit >> 10}KiB"}
        training = recipe.training.model_copy(update=free)
        plan = plan_for(
            recipe.model_copy(update={"strategy": "auto", "training": training}), sources, hardware, here=True
        )
    except UserError:  # a model that the planner does not know
        return (
            "Lower data.max_length, set training.activation_checkpointing=full, or take a strategy that shards or "
            "offloads more, such as fsdp-offload or zero3-offload."
        )
    if plan.chosen is not None:
        return f"By the plan this would fit: {_as_overrides(plan.chosen)}."
    if plan.lever is not None:
        return f"No other strategy would fit by the plan. To fit, {plan.lever}"
    return "Nothing that the planner knows would fit here; take more memory, or a smaller model."


def longest_example(job: Job) -> int:
    """In tokens, of training and evaluation data."""
    return max(int(TokenCache.open(place).lengths.max()) for place in (job.train, job.evaluation) if place is not None)


def _most_of_a_step(job: Job) -> int:
    """No more tokens than this are in a micro-batch, where examples are dealt out evenly."""
    examples = math.ceil(job.recipe.training.global_batch_size / job.recipe.cluster.world_size)
    return int(np.sort(TokenCache.open(job.train).lengths)[-examples:].sum())


def _without_buckets(strategy: Any) -> dict[str, Any]:
    """The strategy, whatever the size of its buckets, which a plan may choose."""
    settings: dict[str, Any] = strategy.model_dump(exclude={"buckets"})
    return settings


def _as_overrides(row: Row) -> str:
    strategy = row.strategy.model_dump(exclude_defaults=True)
    name = row.name if row.name in STRATEGY_PRESETS else f"{row.strategy.kind} ({strategy})"
    return (
        f"strategy={name} training.micro_batch_tokens={row.micro_batch_tokens} "
        f"training.activation_checkpointing={row.activation_checkpointing}, about {gibibytes(row.device_peak_bytes)} a "
        "process"
    )


def _settings(recipe: Recipe, machine: Machine) -> dict[str, Any]:
    """What decides how much fits, as JSON has it."""
    training = recipe.training
    return {
        "strategy": recipe.model_dump(mode="json")["strategy"],
        "processes": recipe.cluster.world_size,
        "memory_limit": training.memory_limit,
        "device_bytes": machine.device_bytes,
        "activation_checkpointing": training.activation_checkpointing,
    }


def _violations(recipe: Recipe) -> set[tuple[str, str]]:
    """Of the rules. A micro-batch that was learned may be smaller than `data.max_length`, where no example is."""
    return {violation for rule in RULES for violation in rule(recipe)}


def _budget(recipe: Recipe) -> int:
    tokens = recipe.training.micro_batch_tokens
    assert tokens != "auto", "the recipe must be resolved first"
    return tokens


def _with(recipe: Recipe, **changes: Any) -> Recipe:
    training: Training = recipe.training.model_copy(update=changes)
    return recipe.model_copy(update={"training": training})
