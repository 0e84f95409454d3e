"""What a forward pass keeps for the backward pass, and what that needs on its way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from understudy.plan.network import Layers, Network
from understudy.plan.shape.layer import Traced, norm, trace_layer
from understudy.plan.shape.tape import Line, Tape, Treatment

__all__ = ["Activations", "Checkpointing", "Kernels", "Work", "trace_activations", "trace_work"]

Checkpointing = Literal["none", "selective", "full"]
_TOKEN_BYTES = 48
"""Tokens, labels, positions and their copies on the device, int64."""
_FUSED_BACKWARD = 2.5
"""Products of a fused attention's backward pass over those of its forward pass (Dao, 2022)."""


@dataclass(frozen=True)
class Kernels:
    """What a layer's arithmetic runs on."""

    attention: str
    document: int
    """Tokens of the longest document."""
    accelerated: bool


@dataclass(frozen=True)
class Activations:
    layers: Line
    """Kept of all layers at the end of the forward pass."""
    last_norm: Line
    """Kept of the last norm, until layers go backward."""
    norm_backward: tuple[Line, ...]
    """What is held of the last norm as it goes backward, what was kept of it included."""
    state: Line
    """A layer's input or output."""
    forward: tuple[Line, ...]
    """Beside what is kept, as the last layer goes forward; the highest counts."""
    batch: Line
    """Of the batch itself and its rotary angles."""
    working: tuple[Line, ...]
    """Beside what is kept, as a layer goes backward; the highest counts."""
    sending: tuple[Line, ...]
    """The same, at the operations that make a weight's gradient, on which a bucket may be sent."""
    per_layer: float
    """Share of `layers` that one layer's is."""


@dataclass(frozen=True)
class Work:
    """Arithmetic and traffic of one token in a whole pass, forward and backward, the head apart."""

    flops: float
    attention_flops: float
    """Of them."""
    traffic: float
    """Bytes read and written."""
    forward_flops: float
    """Of a forward pass alone."""
    forward_traffic: float


def trace_activations(
    network: Network,
    itemsize: int,
    kernels: Kernels,
    checkpointing: Checkpointing,
    *,
    casts: bool = False,
    made: int = 0,
    accumulates_layer: bool = False,
) -> Activations:
    """Of a network that computes in `itemsize` bytes, under a strategy with these habits (`Costs`)."""
    total, state = Line(0.0, 0.0), Line(0.0, float(network.shape.sizes.hidden * itemsize))
    forward, working, sending = list[Line](), list[Line](), list[Line]()
    for group, traced in _traces(network, itemsize, kernels, casts=casts, made=made, accumulates=accumulates_layer):
        if not _backward_reaches(group):
            continue
        kept, beside = _treated(traced, checkpointing, state.each)
        forward = [line - kept for line in _forward(traced, checkpointing)]
        if checkpointing == "selective":
            working += [line - kept for line in traced.tape.again(traced.output)]
        total += kept.times(group.count)
        working += [line - beside for line in traced.tape.backward(traced.output)]
        sending += [line - beside for line in traced.tape.backward(traced.output, with_weights=True)]
    return Activations(
        total,
        *_last_norm(network, itemsize, made),
        state,
        tuple(forward),
        _batch(network, itemsize),
        tuple(working),
        tuple(sending),
        1 / network.shape.sizes.layers,
    )


def trace_work(network: Network, itemsize: int, kernels: Kernels, checkpointing: Checkpointing) -> Work:
    flops = attention = traffic = forward = forward_traffic = 0.0
    for group, traced in _traces(network, itemsize, kernels):
        tape = traced.tape
        products = tape.flops - tape.attention_flops
        reaches = _backward_reaches(group)
        again = reaches and checkpointing == "full"
        own = tape.flops * (2 if again else 1)
        if reaches:
            own += products * (1 if group.input_grad or group.trains else 0) + tape.weight_flops
            own += _FUSED_BACKWARD * tape.attention_flops
        flops += group.count * own
        attention += group.count * tape.attention_flops * ((1 + again + _FUSED_BACKWARD) if reaches else 1)
        passes = 1 + (2 + (checkpointing != "none") if reaches else 0)
        traffic += group.count * tape.traffic * passes
        forward += group.count * tape.flops
        forward_traffic += group.count * tape.traffic
    return Work(flops, attention, traffic, forward, forward_traffic)


def _backward_reaches(group: Layers) -> bool:
    return group.input_grad or group.trains


def _traces(
    network: Network, itemsize: int, kernels: Kernels, *, casts: bool = False, made: int = 0, accumulates: bool = False
) -> Iterable[tuple[Layers, Traced]]:
    for group in network.layers:
        treatment = Treatment(
            itemsize=itemsize,
            trained=group.trained.__contains__,
            made=made,
            casts=casts,
            accumulates=accumulates,
            adapters=dict(group.around),
            packed=group.packed,
            prompts=group.prompts,
            attention=kernels.attention,
            document=kernels.document,
            accelerated=kernels.accelerated,
            input_grad=group.input_grad,
        )
        yield group, trace_layer(network.shape.sizes, group.number, treatment)


def _treated(traced: Traced, checkpointing: Checkpointing, state: float) -> tuple[Line, Line]:
    """What is kept of one layer, and how much of it the tape counts in the backward pass. `state` is a layer's input, a
    token."""
    tape = traced.tape
    if checkpointing == "none":
        saved = tape.saved()
        return saved, saved
    again = Line(0.0, state if tape.keeps_input() else 0.0)
    if checkpointing == "full":
        return Line(0.0, state), again
    # What was kept of a layer and its backward pass does not read is let go as the layer is computed again.
    cached = tape.kept_of_costly()
    return cached + Line(0.0, state), cached + again


def _forward(traced: Traced, checkpointing: Checkpointing) -> tuple[Line, ...]:
    tape, output = traced.tape, traced.output
    if checkpointing == "none":
        return tape.forward_saving(output)
    return tape.forward_caching(output) if checkpointing == "selective" else tape.forward(output)


def _last_norm(network: Network, itemsize: int, made: int) -> tuple[Line, tuple[Line, ...]]:
    """What is kept of it, and what it holds in its backward pass."""
    sizes = network.shape.sizes
    trained = any(held.trained and held.role == "norm" for held in network.outside)
    tape = Tape(Treatment(itemsize, trained=lambda name: trained, made=made))
    output = norm(tape, sizes, tape.input(sizes.hidden), sizes.family.last_norm, (sizes.hidden,))
    return tape.saved(), tape.backward(output)


def _batch(network: Network, itemsize: int) -> Line:
    sizes = network.shape.sizes
    angles = 2 * sizes.head_dim * itemsize if sizes.family.rotary else 0
    return Line(0.0, float(angles + _TOKEN_BYTES))
