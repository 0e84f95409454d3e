"""Sentences about a plan: why a strategy wins, why one does not fit, and what to change where nothing does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from understudy.plan.hardware.hardware import Hardware
from understudy.plan.outcome import Plan, Row
from understudy.recipe.adapters import LoRA
from understudy.recipe.quantization import Quantization
from understudy.recipe.schema import Recipe, Training

__all__ = ["gibibytes", "lever", "reason_against", "why_chosen", "why_nothing"]

_SHORTEST = 128
_MOST_DEVICES = 1024


def gibibytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def reason_against(needed: int, limit: int, host_needed: int, hardware: Hardware) -> str:
    """Why something does not fit."""
    if needed > limit:
        return f"needs {gibibytes(needed)} of the {gibibytes(limit)} of a device"
    return f"needs {gibibytes(host_needed)} of the {gibibytes(hardware.host_bytes)} of a host's memory"


def why_chosen(chosen: Row, rows: Sequence[Row], *, fixed: bool) -> str:
    """One sentence, with what the others lack."""
    own = (
        f"{chosen.name} with activation_checkpointing {chosen.activation_checkpointing} and micro-batches of "
        f"{chosen.micro_batch_tokens:,} tokens takes {gibibytes(chosen.device_peak_bytes)} a device and gives about "
        f"{chosen.tokens_per_second_per_device:,.0f} tokens a second and device, bound by {chosen.bound}"
    )
    if fixed:
        return f"{own}; the recipe fixes the strategy."
    slower = [row for row in rows if row.fits and row is not chosen]
    larger = [row.name for row in rows if not row.fits]
    parts = []
    if slower:
        next_best = max(slower, key=lambda row: row.tokens_per_second_per_device)
        rate = next_best.tokens_per_second_per_device / chosen.tokens_per_second_per_device
        if rate > 0.995:
            parts.append(f"{next_best.name} would be as fast")
        else:
            parts.append(f"{next_best.name} comes next at {rate:.0%} of its speed, bound by {next_best.bound}")
    if larger:
        parts.append(f"{', '.join(larger)} {'does' if len(larger) == 1 else 'do'} not fit")
    return "; ".join(["the fastest that fits: " + own, *parts]) + "."


def why_nothing(rows: Sequence[Row], limit: int) -> str:
    least = min(rows, key=lambda row: row.device_peak_bytes)
    if least.device_peak_bytes <= limit:
        return f"nothing fits: {least.name} {least.reason}."
    return (
        f"nothing fits: {least.name} comes nearest and needs {gibibytes(least.device_peak_bytes)} of the "
        f"{gibibytes(limit)} of a device, with activation_checkpointing {least.activation_checkpointing} and "
        f"micro-batches of {least.micro_batch_tokens:,} tokens."
    )


def lever(recipe: Recipe, hardware: Hardware, plan: Callable[[Recipe, Hardware], Plan]) -> str | None:
    """The smallest change after which something fits, and one more, each tried with `plan`; None where none does."""
    found = []
    for words, changed, other in _changes(recipe, hardware):
        chosen = plan(changed, other).chosen
        if chosen is not None:
            found.append(f"{words} ({chosen.name} then takes {gibibytes(chosen.device_peak_bytes)} a device)")
        if len(found) == 2:
            break
    return ", or ".join(found) + "." if found else None


def _changes(recipe: Recipe, hardware: Hardware) -> Iterator[tuple[str, Recipe, Hardware]]:
    """From what costs only speed to what changes the run, and last the machine."""
    training = recipe.training
    if recipe.strategy != "auto":
        yield "set `strategy: auto`", recipe.model_copy(update={"strategy": "auto"}), hardware
    if training.activation_checkpointing in ("none", "selective"):
        full = training.model_copy(update={"activation_checkpointing": "full"})
        yield "set `training.activation_checkpointing: full`", recipe.model_copy(update={"training": full}), hardware
    free = {"activation_checkpointing": "auto", "micro_batch_tokens": "auto"}
    easy = recipe.model_copy(update={"strategy": "auto", "training": training.model_copy(update=free)})
    if training.micro_batch_tokens != "auto":
        yield "set `training.micro_batch_tokens: auto` and leave strategy and checkpointing to it", easy, hardware
    length = recipe.data.max_length // 2
    while length >= _SHORTEST:
        shorter = easy.model_copy(update={"data": recipe.data.model_copy(update={"max_length": length})})
        yield f"set `data.max_length: {length}`", shorter, hardware
        length //= 2
    if recipe.adapter is None:
        adapted = easy.model_copy(update={"adapter": LoRA(), "training": _mixed(easy)})
        yield "set `adapter: lora`", adapted, hardware
        packed = adapted.model_copy(update={"quantization": Quantization()})
        yield "set `adapter: lora` and `quantization: {bits: 4}`", packed, hardware
    elif recipe.quantization is None and isinstance(recipe.adapter, LoRA):
        yield (
            "set `quantization: {bits: 4}`",
            easy.model_copy(update={"quantization": Quantization()}),
            hardware,
        )
    yield from _more_devices(easy, hardware)


def _mixed(recipe: Recipe) -> Training:
    precision = recipe.training.precision
    return recipe.training.model_copy(update={"precision": "bf16" if precision == "pure_bf16" else precision})


def _more_devices(recipe: Recipe, hardware: Hardware) -> Iterator[tuple[str, Recipe, Hardware]]:
    nodes = hardware.nodes
    devices = hardware.devices_per_node
    while devices < 8 and 2 * devices * nodes <= recipe.training.global_batch_size:
        devices *= 2
        yield f"take {devices} devices", recipe, replace(hardware, devices_per_node=devices)
    while 2 * nodes * devices <= min(_MOST_DEVICES, recipe.training.global_batch_size):
        nodes *= 2
        yield (
            f"take {nodes} hosts of {devices} devices",
            recipe,
            replace(hardware, devices_per_node=devices, nodes=nodes),
        )
