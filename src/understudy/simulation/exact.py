"""The exact tier of a plan: the row that is taken, simulated."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from understudy.errors import UserError
from understudy.plan.advice import gibibytes
from understudy.plan.memory.setting import precision_of
from understudy.plan.outcome import Plan, Row
from understudy.plan.shape.attention import kernel_for
from understudy.plan.shape.model import ModelShape
from understudy.recipe.deepspeed_file import effective_deepspeed
from understudy.recipe.schema import DDP, FSDP, DeepSpeed, Recipe
from understudy.simulation.live_tensors import Moment
from understudy.simulation.simulate import Simulation, simulate

__all__ = ["MOST_PROCESSES", "Exact", "simulate_plan"]

MOST_PROCESSES = 1024
_SHOWN = 12
"""Kinds of tensors that a terminal shows."""


@dataclass(frozen=True)
class Exact:
    row: Row
    processes: int
    simulation: Simulation
    offloads: bool
    """Part of the tensors are in host memory, which a simulation does not tell apart."""

    @property
    def device_bytes(self) -> int | None:
        """With what the plan counts outside of tensors; None where part of them is in host memory."""
        if self.offloads:
            return None
        return self.simulation.peak_bytes + self.row.breakdown["context"] + self.row.breakdown["fragmentation"]

    def to_json(self) -> dict[str, Any]:
        found = self.simulation
        return {
            "strategy": self.row.name,
            "processes": self.processes,
            "tensor_peak_bytes": found.peak_bytes,
            "device_peak_bytes": self.device_bytes,
            "includes_host_memory": self.offloads,
            "peak_moment": found.peak_moment,
            "seconds": round(found.seconds, 2),
            "timeline": [
                {"moment": one.name, "bytes_at_start": one.bytes_at_start, "peak_bytes": one.peak_bytes}
                for one in found.timeline
            ],
            "alive_at_peak": [
                {
                    "born": one.born,
                    "backward": one.backward,
                    "module": one.module,
                    "operator": one.operator,
                    "count": one.count,
                    "bytes": one.bytes,
                }
                for one in found.alive
            ],
        }

    def lines(self) -> list[str]:
        """What a terminal shows below the plan's table."""
        found, planned = self.simulation, self.row.tensor_peak_bytes
        where = f"{self.row.name} on {self.processes:,} process{'es' if self.processes > 1 else ''}"
        said = f"Simulated, {where}: tensors take {gibibytes(found.peak_bytes)} at the peak ({found.peak_moment})"
        if self.offloads:
            said += ", those in host memory included"
        else:
            assert self.device_bytes is not None, "nothing is offloaded"
            said += (
                f", {found.peak_bytes / planned - 1:+.1%} of what was planned; with context and fragmentation "
                f"{gibibytes(self.device_bytes)} of a device"
            )
        lines = [f"{said}. It took {found.seconds:.0f} s.", "", "  at most GiB  during"]
        lines += [f"  {size / 2**30:11,.2f}  {name}" for name, size in _stretches(found.timeline)]
        lines += ["", "  GiB at the peak  tensors  made by"]
        for one in found.alive[:_SHOWN]:
            maker = " ".join(word for word in (one.module, one.operator) if word)
            when = f"{one.born}{' (backward pass)' if one.backward and not one.born.startswith('backward') else ''}"
            lines.append(f"  {one.bytes / 2**30:15,.2f}  {one.count:7,}  {maker}, {when}")
        rest = found.alive[_SHOWN:]
        if rest:
            size, count = sum(one.bytes for one in rest), sum(one.count for one in rest)
            lines.append(f"  {size / 2**30:15,.2f}  {count:7,}  others")
        return lines


def simulate_plan(recipe: Recipe, plan: Plan, teachers: Sequence[ModelShape | None] = ()) -> Exact:
    """The row that `plan` takes, or where nothing fits the one that comes nearest, simulated with all of its processes.

    Raises `UserError` for more than `MOST_PROCESSES`, and for what cannot be simulated.
    """
    hardware = plan.hardware
    if hardware.devices > MOST_PROCESSES:
        raise UserError(
            f"--exact simulates up to {MOST_PROCESSES:,} processes, and these are {hardware.devices:,}; leave it out, "
            "or plan for fewer: beyond a few hundred little changes."
        )
    row = plan.chosen or plan.nearest
    if row is None:
        raise UserError("the recipe's rules allow no strategy here, so there is nothing to simulate.", key="strategy")
    training = recipe.training.model_copy(
        update={
            "micro_batch_tokens": row.micro_batch_tokens,
            "activation_checkpointing": row.activation_checkpointing,
            "precision": plan.precision,
        }
    )
    resolved = recipe.model_copy(update={"strategy": row.strategy, "training": training})
    device = hardware.accelerator
    itemsize = precision_of(plan.precision).compute
    with contextlib.redirect_stdout(io.StringIO()):  # packages say there what they compiled
        found = simulate(
            resolved,
            plan.shape,
            processes=hardware.devices,
            micro_batches=row.micro_batches,
            kernel=kernel_for(plan.shape.sizes, device.api, device.capability, itemsize, recipe.model.attention),
            gloo=not hardware.accelerated,
            teachers=teachers,
        )
    return Exact(row, hardware.devices, found, _offloads(row.strategy))


def _offloads(strategy: DDP | FSDP | DeepSpeed) -> bool:
    if isinstance(strategy, DeepSpeed):
        return effective_deepspeed(strategy)[1:] != ("none", "none")
    return isinstance(strategy, FSDP) and strategy.offload


def _stretches(timeline: Sequence[Moment]) -> list[tuple[str, int]]:
    """The highest of moments that follow each other and are of one kind, numbers of layers left out."""

    def kind(moment: Moment) -> str:
        words = moment.name.split()
        return f"{words[0]} layers" if words[-1].isdigit() else moment.name

    return [(name, max(one.peak_bytes for one in same)) for name, same in groupby(timeline, key=kind)]
