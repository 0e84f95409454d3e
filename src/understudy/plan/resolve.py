"""What `auto` comes to on a machine: a function of recipe, machine and number of processes. Imports no torch."""

from __future__ import annotations

from typing import Any

from understudy.plan.machine import Machine
from understudy.recipe.deepspeed_file import file_precision
from understudy.recipe.schema import DDP, FSDP, DeepSpeed, Recipe

__all__ = ["resolve"]

_TOKENS_ON_ACCELERATOR = 8192
_TOKENS_ON_CPU = 2048


def resolve(recipe: Recipe, machine: Machine, processes: int) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with no `auto` left, and a line for each choice that was made.

    Precision follows what a DeepSpeed file enables, so that file and recipe agree; raises `UserError` when the file
    cannot be read. `attention` stays for the device to choose, because only it knows which kernels are installed.
    """
    training: dict[str, Any] = {}
    top: dict[str, Any] = {}
    choices: list[str] = []
    where = "on accelerators" if machine.accelerated else "on a processor"

    if recipe.training.precision == "auto":
        usual = "bf16" if machine.accelerated else "fp32"
        asked = file_precision(recipe.strategy, usual) if isinstance(recipe.strategy, DeepSpeed) else usual
        training["precision"] = asked
        choices.append(f"training.precision: {asked}, {where if asked == usual else 'as the DeepSpeed file says'}")
    if recipe.training.micro_batch_tokens == "auto":
        room = _TOKENS_ON_ACCELERATOR if machine.accelerated else _TOKENS_ON_CPU
        training["micro_batch_tokens"] = tokens = max(recipe.data.max_length, room)
        choices.append(f"training.micro_batch_tokens: {tokens}, room for one example and for the usual {room} {where}")
    if recipe.training.activation_checkpointing == "auto":
        training["activation_checkpointing"] = "none"
        choices.append("training.activation_checkpointing: none, the fastest")
    if recipe.strategy == "auto":
        top["strategy"] = FSDP() if machine.accelerated and processes > 1 else DDP()
        reason = "one process" if processes == 1 else f"{processes} processes {where}"
        choices.append(f"strategy: {top['strategy'].kind}, for {reason}")
    if recipe.data.num_workers == "auto":
        top["data"] = recipe.data.model_copy(update={"num_workers": machine.cores})
        choices.append(f"data.num_workers: {machine.cores}, one a core")
    if recipe.cluster.processes != processes:
        top["cluster"] = recipe.cluster.model_copy(update={"processes": processes})
        choices.append(f"cluster.processes: {processes}")
    if training:
        top["training"] = recipe.training.model_copy(update=training)
    return recipe.model_copy(update=top), tuple(choices)
