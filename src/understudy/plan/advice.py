"""Sentences about a plan: why a strategy wins, why one does not fit, and what to change where nothing does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from understudy.plan.hardware.hardware import Hardware
from understudy.plan.outcome import Plan, Row
from understudy.recipe.adapters import LoRA
from understudy.recipe.quantization import Quantization
from understudy.recipe.schema import Recipe, Training

__all__ = ["gibibytes", "lever", "nearest_of", "reason_against", "why_chosen", "why_nothing"]

_SHORTEST = 128
_MOST_DEVICES = 1024


def gibibytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def reason_against(needed: int, teachers: int, limit: int, host_needed: int, hardware: Hardware) -> str:
    """Why something does not fit; `teachers` is needed on a device that these have for themselves."""
    if needed > limit:
        return f"needs {gibibytes(needed)} of the {gibibytes(limit)} of a device"
    if teachers > limit:
        return f"needs {gibibytes(teachers)} of the {gibibytes(limit)} of the teacher's own device"
    return f"needs {gibibytes(host_needed)} of the {gibibytes(hardware.host_bytes)} of a host's memory"


def why_chosen(chosen: Row, rows: Sequence[Row], hardware: Hardware, *, fixed: bool) -> str:
    """One sentence, with what the others lack."""
    # Of a machine that is named only, nobody knows how much memory its host has.
    offloads = chosen.host_peak_bytes > hardware.devices_per_node * hardware.process_bytes > 0
    host = f" and {gibibytes(chosen.host_peak_bytes)} of its host" if offloads else ""
    own = (
        f"{chosen.name} with activation_checkpointing {chosen.activation_checkpointing} and micro-batches of "
        f"{chosen.micro_batch_tokens:,} tokens takes {gibibytes(chosen.device_peak_bytes)} a device{host} and "
        f"gives about {chosen.tokens_per_second_per_device:,.0f} tokens a second and device, bound by {chosen.bound}"
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


def nearest_of(rows: Sequence[Row], limit: int, hardware: Hardware) -> Row | None:
    """The one of `rows` that exceeds what it may have by least; None where none of them can be taken."""

    def overdone(row: Row) -> float:
        on_host = row.host_peak_bytes / hardware.host_bytes if hardware.host_bytes else 0.0
        return max(row.device_peak_bytes / limit, on_host)

    return min((row for row in rows if not row.refused), key=overdone, default=None)


def why_nothing(rows: Sequence[Row], nearest: Row | None) -> str:
    if nearest is None:
        return f"nothing can be taken: {rows[0].name}: {rows[0].reason}"
    return (
        f"nothing fits: {nearest.name} comes nearest and {nearest.reason}, with activation_checkpointing "
        f"{nearest.activation_checkpointing} and micro-batches of {nearest.micro_batch_tokens:,} tokens."
    )


def lever(recipe: Recipe, hardware: Hardware, plan: Callable[[Recipe, Hardware], Plan]) -> str | None:
    """The smallest change after which something fits, and one of another kind, each tried with `plan`; None where none
    does."""
    found: dict[str, str] = {}
    for kind, words, changed, other in _changes(recipe, hardware):
        chosen = None if kind in found else plan(changed, other).chosen
        if chosen is not None:
            found[kind] = f"{words} ({chosen.name} then takes {gibibytes(chosen.device_peak_bytes)} a device)"
        if len(found) == 2:
            break
    return ", or ".join(found.values()) + "." if found else None


_Change = tuple[str, str, Recipe, Hardware]
"""Its kind, what to do, and the recipe and machine that come of it."""


def _changes(recipe: Recipe, hardware: Hardware) -> Iterator[_Change]:
    """From what costs only speed to what changes the run, and last the machine."""
    training = recipe.training
    if recipe.strategy != "auto":
        free_strategy = recipe.model_copy(update={"strategy": "auto"})
        yield "settings", "set `strategy: auto`", free_strategy, hardware
    if training.activation_checkpointing in ("none", "selective"):
        full = training.model_copy(update={"activation_checkpointing": "full"})
        changed = recipe.model_copy(update={"training": full})
        yield "settings", "set `training.activation_checkpointing: full`", changed, hardware
    free = {"activation_checkpointing": "auto", "micro_batch_tokens": "auto"}
    easy = recipe.model_copy(update={"strategy": "auto", "training": training.model_copy(update=free)})
    if easy != recipe:
        words = "leave `strategy`, `training.micro_batch_tokens` and `training.activation_checkpointing` to `auto`"
        yield "settings", words, easy, hardware
    length = recipe.data.max_length // 2
    while length >= _SHORTEST:
        shorter = easy.model_copy(update={"data": recipe.data.model_copy(update={"max_length": length})})
        yield "length", f"set `data.max_length: {length}`", shorter, hardware
        length //= 2
    if recipe.adapter is None:
        adapted = easy.model_copy(update={"adapter": LoRA(), "training": _mixed(easy)})
        yield "adapter", "set `adapter: lora`", adapted, hardware
        packed = adapted.model_copy(update={"quantization": Quantization()})
        yield "adapter", "set `adapter: lora` and `quantization: {bits: 4}`", packed, hardware
    elif recipe.quantization is None and isinstance(recipe.adapter, LoRA):
        packed = easy.model_copy(update={"quantization": Quantization()})
        yield "adapter", "set `quantization: {bits: 4}`", packed, hardware
    yield from _more_devices(easy, hardware)


def _mixed(recipe: Recipe) -> Training:
    precision = recipe.training.precision
    return recipe.training.model_copy(update={"precision": "bf16" if precision == "pure_bf16" else precision})


def _more_devices(recipe: Recipe, hardware: Hardware) -> Iterator[_Change]:
    nodes, devices = hardware.nodes, hardware.devices_per_node
    while hardware.accelerated and devices < 8 and 2 * devices * nodes <= recipe.training.global_batch_size:
        devices *= 2
        yield "devices", f"take {devices} devices", recipe, replace(hardware, devices_per_node=devices)
    of = f" of {devices} devices" if hardware.accelerated and devices > 1 else ""
    while 2 * nodes * devices <= min(_MOST_DEVICES, recipe.training.global_batch_size):
        nodes *= 2
        yield "devices", f"take {nodes} hosts{of}", recipe, replace(hardware, devices_per_node=devices, nodes=nodes)
