"""Training the whole model: speed and memory of `understudy train` against a bare loop."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.side_by_side import STREAM, Extent, Method, Workload, compare_sides, comparison_rows, cores
from benchmarks.table import print_table

__all__ = ["compare"]

WHOLE = Method("whole model", "fp32")


@dataclass(frozen=True)
class Goal:
    workload: Workload
    speed: float
    """Least ratio of tokens per second."""
    memory: float | None
    """Most ratio of peak memory."""


GOALS = (
    Goal(STREAM, speed=0.97, memory=None),
    Goal(Workload("Alpaca", "alpaca_en_demo.json", batch=8, length=256), speed=1.15, memory=1.0),
)


def compare(model: Path, data: Path, extent: Extent) -> None:
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as scratch:
        for goal in GOALS:
            workload = goal.workload
            outcome = compare_sides(
                workload, WHOLE, model.resolve(), data.resolve(), Path(scratch) / workload.source, extent
            )
            name = f"{workload.batch} examples, {outcome.tokens_per_step:,.0f} tokens a step"
            print_table(
                f"Training {model.name}, {workload.name}, {WHOLE.precision}, {cores()} CPU cores, "
                f"{extent.steps} steps × {extent.rounds} rounds",
                "bare loop",
                comparison_rows(name, outcome, speed_goal=goal.speed, memory_goal=goal.memory),
            )
