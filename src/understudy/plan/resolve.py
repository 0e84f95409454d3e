"""What `auto` comes to on a machine: a plan's choice, or the usual one where there is no plan. Imports no torch."""

from __future__ import annotations

from typing import Any

from understudy.plan.advice import gibibytes
from understudy.plan.machine import Machine
from understudy.plan.outcome import Plan, Row
from understudy.recipe.presets import STRATEGY_PRESETS
from understudy.recipe.schema import DDP, FSDP, DeepSpeed, Recipe

__all__ = ["planned_fields", "resolve"]

_TOKENS_ON_ACCELERATOR = 8192
_TOKENS_ON_CPU = 2048


def resolve(
    recipe: Recipe,
    machine: Machine,
    processes: int,
    precision: str,
    plan: Plan | None = None,
    *,
    nodes: int = 1,
    why: str = "",
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with no `auto` left, for `processes` in all on `nodes` hosts, and a line for each choice that was
    made: one for all that `plan` chooses.

    Without a plan, or where nothing of it fits, the usual choices are taken. `precision` is what `auto` comes to here
    (`plan.estimate.usual_precision`). `why` replaces the reason that the line gives. `attention` stays for the device
    to choose, because only it knows which kernels are installed.
    """
    row = None if plan is None else plan.chosen
    taken = _usual(recipe, machine, processes) if row is None else _of_row(row)
    taken["precision"] = precision
    asked = planned_fields(recipe)
    top: dict[str, Any] = {}
    choices: list[str] = []
    if asked:
        reason = why or (_as_usual(machine, processes) if plan is None or row is None else _as_planned(plan, row))
        choices.append(f"{', '.join(_words(name, taken[name]) for name in asked)}: {reason}")
        training = {name: taken[name] for name in asked if name != "strategy"}
        top = {"training": recipe.training.model_copy(update=training)}
        top |= {"strategy": taken["strategy"]} if "strategy" in asked else {}
    if isinstance(recipe.strategy, DeepSpeed) and recipe.strategy.buckets == "auto":
        top["strategy"] = recipe.strategy.model_copy(update={"buckets": _buckets(plan, recipe.strategy)})
    if recipe.data.num_workers == "auto":
        top["data"] = recipe.data.model_copy(update={"num_workers": machine.cores})
        choices.append(f"data.num_workers: {machine.cores}, one a core")
    per_host = -(-processes // nodes)
    if (recipe.cluster.processes, recipe.cluster.nodes) != (per_host, nodes):
        top["cluster"] = recipe.cluster.model_copy(update={"processes": per_host, "nodes": nodes})
        hosts = f" on each of {nodes} hosts" if nodes > 1 else ""
        choices.append(f"cluster.processes: {per_host}{hosts}")
    return recipe.model_copy(update=top), tuple(choices)


def planned_fields(recipe: Recipe) -> tuple[str, ...]:
    """What a plan chooses of what the recipe leaves to `auto`, in the order in which it is told."""
    training = recipe.training
    values = {
        "strategy": recipe.strategy,
        "micro_batch_tokens": training.micro_batch_tokens,
        "activation_checkpointing": training.activation_checkpointing,
        "precision": training.precision,
    }
    return tuple(name for name, value in values.items() if value == "auto")


def _of_row(row: Row) -> dict[str, Any]:
    return {
        "strategy": row.strategy,
        "micro_batch_tokens": row.micro_batch_tokens,
        "activation_checkpointing": row.activation_checkpointing,
    }


def _usual(recipe: Recipe, machine: Machine, processes: int) -> dict[str, Any]:
    """What suits most models on such a machine."""
    room = _TOKENS_ON_ACCELERATOR if machine.accelerated else _TOKENS_ON_CPU
    return {
        "strategy": FSDP() if machine.accelerated and processes > 1 else DDP(),
        "micro_batch_tokens": max(recipe.data.max_length, room),
        "activation_checkpointing": "none",
    }


def _as_usual(machine: Machine, processes: int) -> str:
    where = "on accelerators" if machine.accelerated else "on a processor"
    return f"as usual {where}, in {'one process' if processes == 1 else f'{processes} processes'}"


def _as_planned(plan: Plan, row: Row) -> str:
    return (
        f"the fastest that fits {gibibytes(plan.limit_bytes)} ({gibibytes(row.device_peak_bytes)} planned, about "
        f"{row.tokens_per_second_per_device:,.0f} tokens/s a {'device' if plan.hardware.accelerated else 'process'})"
    )


def _buckets(plan: Plan | None, strategy: DeepSpeed) -> str:
    """Those of the plan's row, whether it fits or not; large ones without a plan."""
    for row in () if plan is None else plan.rows:
        if isinstance(row.strategy, DeepSpeed) and row.strategy.model_copy(update={"buckets": "auto"}) == strategy:
            return row.strategy.buckets
    return "large"


def _words(name: str, value: Any) -> str:
    if name == "strategy":
        return _strategy_name(value)
    if name == "micro_batch_tokens":
        return f"micro-batches of {value:,} tokens"
    if name == "activation_checkpointing":
        return f"{'no' if value == 'none' else value} activation checkpointing"
    return str(value)


def _strategy_name(strategy: DDP | FSDP | DeepSpeed) -> str:
    """The preset's, of which the choices are."""
    settings = strategy.model_dump(exclude_none=True, exclude_defaults=True) | {"kind": strategy.kind}
    small = settings.pop("buckets", "large") == "small"
    name = next((name for name, preset in STRATEGY_PRESETS.items() if preset == settings), strategy.kind)
    return f"{name} with small buckets" if small else name
