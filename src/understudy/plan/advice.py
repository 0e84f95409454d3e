"""Sentences about a plan: why a strategy wins, why one does not fit, and what to change where nothing does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from understudy.plan.hardware.hardware import Hardware
from understudy.plan.outcome import Plan, Row
from understudy.recipe.adapters import LoRA
from understudy.recipe.objectives import Distillation
from understudy.recipe.quantization import Quantization
from understudy.recipe.schema import Recipe, Training
from understudy.recipe.teachers import (
    CachedTeacher,
    OneTeacher,
    ResidentTeacher,
    SeveralTeachers,
    ShardedTeacher,
    Teacher,
)

__all__ = ["gibibytes", "lever", "nearest_of", "reason_against", "why_chosen", "why_nothing"]

_SHORTEST = 128
_LENGTH_STEP = 64
"""Lengths of examples are named in multiples of so many tokens."""
_MOST_DEVICES = 1024


def gibibytes(size: int) -> str:
    """With a unit that leaves something to read of what is small."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:,.0f} MiB"


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


def lever(
    recipe: Recipe, hardware: Hardware, nearest: Row | None, plan: Callable[[Recipe, Hardware, int | None], Plan]
) -> str | None:
    """The smallest change after which something fits, and one of another kind, each tried with `plan`; None where none
    does. `plan` takes a recipe, a machine, and a limit in bytes in place of the recipe's, or None."""
    found: dict[str, str] = {}
    limit = None if recipe.training.memory_limit is None or nearest is None else _enough(nearest, hardware)
    if limit is not None and limit <= hardware.accelerator.usable_bytes:
        roomy = hardware if hardware.accelerated else replace(hardware, host_bytes=limit * hardware.devices_per_node)
        words = f"raise `training.memory_limit` to {limit / 2**30:.1f}GiB"
        found |= _said("memory", words, plan(recipe, roomy, limit).chosen)
    for kind, words, changed, other in _changes(recipe, hardware):
        if len(found) == 2:
            break
        chosen = None if kind in found else plan(changed, other, None).chosen
        if chosen is not None and kind == "length":
            changed, chosen = _longest(changed, chosen, lambda shorter: plan(shorter, hardware, None))
            words = f"set `data.max_length: {changed.data.max_length}`"
        found |= _said(kind, words, chosen)
    return ", or ".join(found.values()) + "." if found else None


def _said(kind: str, words: str, chosen: Row | None) -> dict[str, str]:
    if chosen is None:
        return {}
    return {kind: f"{words} ({chosen.name} then takes {gibibytes(chosen.device_peak_bytes)} a device)"}


def _enough(nearest: Row, hardware: Hardware) -> int:
    """What a process needs for that row, rounded up to a tenth of a GiB."""
    needed = nearest.device_peak_bytes
    if not hardware.accelerated:
        needed = max(needed, -(-nearest.host_peak_bytes // hardware.devices_per_node))
    tenth = 2**30 / 10
    return math.ceil(math.ceil(needed / tenth) * tenth)


def _longest(recipe: Recipe, chosen: Row, plan: Callable[[Recipe], Plan]) -> tuple[Recipe, Row]:
    """Examples fit as long as those of `recipe` and not twice as long: about as long as they may be, and what is taken
    then."""
    low, high = recipe.data.max_length, 2 * recipe.data.max_length
    while high - low > max(_LENGTH_STEP, low // 16):
        middle = (low + high) // 2 // _LENGTH_STEP * _LENGTH_STEP
        longer = _with_length(recipe, middle)
        found = plan(longer).chosen
        if found is None:
            high = middle
        else:
            low, recipe, chosen = middle, longer, found
    return recipe, chosen


def _with_length(recipe: Recipe, length: int) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": length})})


_Change = tuple[str, str, Recipe, Hardware]
"""Its kind, what to do, and the recipe and machine that come of it."""


def _changes(recipe: Recipe, hardware: Hardware) -> Iterator[_Change]:
    """From what costs only speed to what changes the run, and last the machine."""
    training = recipe.training
    alone = {"strategy": "auto", "parallel": recipe.parallel.model_copy(update={"replicate": 1})}
    also = " without `parallel.replicate`" if recipe.parallel.replicate > 1 else ""
    if recipe.strategy != "auto":
        yield "settings", f"set `strategy: auto`{also}", recipe.model_copy(update=alone), hardware
    if training.activation_checkpointing in ("none", "selective"):
        full = training.model_copy(update={"activation_checkpointing": "full"})
        changed = recipe.model_copy(update={"training": full})
        yield "settings", "set `training.activation_checkpointing: full`", changed, hardware
    free = {"activation_checkpointing": "auto", "micro_batch_tokens": "auto"}
    easy = recipe.model_copy(update=alone | {"training": training.model_copy(update=free)})
    if easy != recipe:
        words = "leave `strategy`, `training.micro_batch_tokens` and `training.activation_checkpointing` to `auto`"
        yield "settings", words + also, easy, hardware
    for words, taught in _other_teachers(easy):
        yield "teacher", words, taught, hardware
    length = recipe.data.max_length // 2
    while length >= _SHORTEST:
        yield "length", f"set `data.max_length: {length}`", _with_length(easy, length), hardware
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


def _other_teachers(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Ways to hold the recipe's teachers that need less memory, and what to say of them."""
    if not isinstance(recipe.objective, Distillation):
        return
    several = isinstance(recipe.objective.teacher, SeveralTeachers)
    where = "in each of `objective.teacher.teachers`" if several else "in `objective.teacher`"

    def sharded(one: OneTeacher) -> OneTeacher:
        if not isinstance(one, ResidentTeacher) or one.device != "own" or one.quantization is not None:
            return one
        return ShardedTeacher(path=one.path, revision=one.revision, precision=one.precision)

    def quantized(one: OneTeacher) -> OneTeacher:
        if not isinstance(one, ResidentTeacher | ShardedTeacher):
            return one
        return ResidentTeacher(
            path=one.path, revision=one.revision, precision=one.precision, quantization=Quantization()
        )

    def cached(one: OneTeacher) -> OneTeacher:
        if not isinstance(one, ResidentTeacher | ShardedTeacher):
            return one
        return CachedTeacher(path=one.path, revision=one.revision, precision=one.precision)

    for words, change in (
        (f"set `kind: sharded` {where}", sharded),
        (f"set `kind: resident` and `quantization: {{bits: 4}}` {where}", quantized),
        (f"set `kind: cache` {where}", cached),
    ):
        objective = recipe.objective
        teacher = objective.teacher
        changed: Teacher
        if isinstance(teacher, SeveralTeachers):
            changed = teacher.model_copy(update={"teachers": tuple(change(one) for one in teacher.teachers)})
        else:
            changed = change(teacher)
        if changed != teacher:
            yield words, recipe.model_copy(update={"objective": objective.model_copy(update={"teacher": changed})})


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
