"""What an adapter adds around a linear layer, on a `Tape` (peft's layers)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from understudy.plan.shape.tape import Line, Storage, Tape, Value

__all__ = ["Around", "apply_around"]


@dataclass(frozen=True)
class Around:
    kind: Literal["lora", "dora", "vera", "ia3_input", "ia3_output"]
    rank: int = 0
    dropout: float = 0.0


def apply_around(tape: Tape, around: object, read: Value, out: Value, inputs: int, outputs: int) -> Value:
    """The adapted layer's result: `out` is that of the layer itself, `read` its input."""
    assert isinstance(around, Around)
    if around.kind == "ia3_input":  # scales what the layer reads, before it reads it
        scaled = tape.new(inputs, grad=True)
        tape.record((read,), (scaled,), (read,), weight=tape.gradient(inputs))
        return Value(out.storage, out.width, True)
    if around.kind == "ia3_output":
        scaled = tape.new(outputs, grad=True)
        tape.record((out,), (scaled,), (out,), weight=tape.gradient(outputs))
        return scaled
    return _low_rank(tape, around, read, out, inputs, outputs)


def _low_rank(tape: Tape, around: Around, read: Value, out: Value, inputs: int, outputs: int) -> Value:
    rank = around.rank
    if around.dropout:
        mask = Storage(Line(0.0, float(inputs * (1 if tape.treatment.accelerated else tape.itemsize))))
        dropped = tape.new(inputs, grad=read.grad)
        tape.record((read,), (dropped,), (mask,))
        read = dropped
    frozen = around.kind == "vera"
    inner, wide = tape.new(rank, grad=True), tape.new(outputs, grad=True)
    # Trained matrices keep their inputs; VeRA's are frozen, and the scales behind them keep what they scale.
    weight = 0.0 if frozen else tape.gradient(rank)
    copied = rank * tape.itemsize if tape.treatment.casts and not frozen else 0
    down, up = (Storage(Line(float(copied * width), 0.0)) for width in (inputs, outputs))
    kept_down: list[Value | Storage] = [inner] if frozen else [read, *([down] if read.grad else [])]
    kept_up: list[Value | Storage] = [wide] if frozen else [inner, up]
    tape.record((read,), (inner,), kept_down, weight=weight * inputs, costly=True)
    tape.record((inner,), (wide,), kept_up, weight=weight * outputs, costly=True)
    tape.flops += 2.0 * rank * (inputs + outputs)
    tape.weight_flops += 0.0 if frozen else 2.0 * rank * (inputs + outputs)
    if around.kind == "dora":
        # Both parts are scaled by magnitude over norm, which is trained; the norm is of the merged weight.
        merged = Line(float(inputs * outputs * 4), 0.0)
        scaled = tape.new(outputs, grad=True)
        tape.record((out, wide), (scaled,), (out, wide), weight=tape.gradient(outputs), scratch=merged)
        tape.flops += 2.0 * rank * inputs * outputs / max(1, tape.treatment.document)
        return tape.add(out, scaled)
    return tape.add(out, wide, scaled=True)
