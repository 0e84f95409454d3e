"""The peak of a device's memory in a step: the highest of a few moments, and what is there then."""

from __future__ import annotations

from dataclasses import dataclass

from understudy.plan.memory.activations import Activations
from understudy.plan.memory.head import Head
from understudy.plan.memory.setting import Costs, Instant
from understudy.plan.memory.teacher import TeacherCosts
from understudy.plan.shape.tape import peak

__all__ = ["COMPONENTS", "DevicePeak", "device_peak"]

COMPONENTS = (
    "weights",
    "gradients",
    "moments",
    "gathered",
    "activations",
    "head",
    "communication",
    "teacher",
    "context",
    "fragmentation",
)
"""Of a breakdown, in the order in which they are shown."""
_FRAGMENTATION = 0.04
"""Share of what comes and goes within a step that the caching allocator holds in blocks that do not fit: 3 to 5 % of it
in steady state, with blocks rounded to 2 MiB."""


@dataclass(frozen=True)
class DevicePeak:
    moment: str
    """entry, forward, turn, loss, head, norm, layers, embedding, sending, step or teacher: when the peak is."""
    breakdown: dict[str, int]
    """Bytes of each of `COMPONENTS` then."""

    @property
    def tensor_bytes(self) -> int:
        """Of tensors alone."""
        outside = ("context", "fragmentation")
        return sum(size for name, size in self.breakdown.items() if name not in outside)

    @property
    def total_bytes(self) -> int:
        return sum(self.breakdown.values())


def device_peak(
    costs: Costs, activations: Activations, head: Head, teacher: TeacherCosts, tokens: int, *, context_bytes: int
) -> DevicePeak:
    """With micro-batches of `tokens`; `context_bytes` is what a process holds outside its allocator."""
    kept, batch = activations.layers.at(tokens), activations.batch.at(tokens)
    everything = kept + activations.last_norm.at(tokens) + batch
    said = int(teacher.kept * tokens)
    moments: list[tuple[str, Instant, int, int, int]] = [
        ("loss", costs.loss, everything, head.loss_bytes(tokens), said),
        ("head", costs.head, everything, head.kept_bytes(tokens), said),
        ("embedding", costs.embedding, activations.state.at(tokens) + batch, 0, said),
        ("step", costs.step, 0, 0, 0),
    ]
    if costs.entry is not None:
        moments.append(("entry", costs.entry, batch, 0, said))
    if costs.turn is not None:
        moments.append(("turn", costs.turn, everything, 0, said))
    if costs.sending is not None:
        moments.append(("sending", costs.sending, batch, 0, said))
    ahead = kept + batch + max(0, peak(activations.forward, tokens))
    moments.append(("forward", costs.turn or costs.forward or costs.loss, ahead, 0, said))
    if costs.layers:
        moments.append(("norm", costs.layers[0], kept + batch + peak(activations.norm_backward, tokens), 0, said))
    working, sending = peak(activations.working, tokens), peak(activations.sending, tokens)
    for instant in costs.layers:
        # The last of the layers is still at work when the share is whole.
        left = max(activations.per_layer, 1.0 - instant.layers_done)
        beside = sending if instant.sends else working
        moments.append(("layers", instant, int(left * kept) + batch + beside, 0, said))
    if teacher.forward:
        asked = Instant(gathered=costs.loss.gathered, gradients=costs.loss.gradients, communication=0)
        moments.append(("teacher", asked, peak(teacher.forward, tokens), 0, said + teacher.gathered))
    peaks = [_at(costs, teacher, *moment, context_bytes=context_bytes) for moment in moments]
    return max(peaks, key=lambda one: one.total_bytes)


def _at(
    costs: Costs,
    teacher: TeacherCosts,
    name: str,
    instant: Instant,
    activations: int,
    head: int,
    said: int,
    *,
    context_bytes: int,
) -> DevicePeak:
    passing = instant.gathered + activations + head + instant.communication + said
    breakdown = {
        "weights": costs.weights,
        "gradients": instant.gradients,
        "moments": costs.moments,
        "gathered": instant.gathered,
        "activations": activations,
        "head": head,
        "communication": instant.communication,
        "teacher": teacher.device_bytes + said,
        "context": context_bytes,
        "fragmentation": int(_FRAGMENTATION * passing),
    }
    assert tuple(breakdown) == COMPONENTS, "one order everywhere"
    return DevicePeak(name, breakdown)
