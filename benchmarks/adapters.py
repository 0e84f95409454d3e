"""LoRA and QLoRA: speed and memory of `understudy train` against a bare loop over a model that peft adapts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.side_by_side import STREAM, Extent, Method, Workload, compare_sides, comparison_rows, cores
from benchmarks.table import print_table

__all__ = ["METHODS", "compare", "lora", "qlora"]

RANK, ALPHA = 16, 32
SPEED_GOAL = 0.97
"""Least ratio of tokens per second."""


def lora(precision: str) -> Method:
    adapter = {"kind": "lora", "rank": RANK, "alpha": ALPHA, "targets": "all-linear"}
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    return Method("LoRA", precision, {"adapter": adapter}, {"adapter": settings, "quantized": False})


def qlora(precision: str) -> Method:
    plain = lora(precision)
    quantization = {"bits": 4, "type": "nf4", "double": True}
    return Method("QLoRA", precision, {**plain.recipe, "quantization": quantization}, {**plain.bare, "quantized": True})


METHODS = tuple(make(precision) for make in (lora, qlora) for precision in ("bf16", "fp32"))


def compare(
    model: Path, data: Path, extent: Extent, *, methods: Sequence[Method] = METHODS, workload: Workload = STREAM
) -> None:
    rows = []
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as scratch:
        for method in methods:
            place = Path(scratch) / f"{method.name}-{method.precision}"
            outcome = compare_sides(workload, method, model.resolve(), data.resolve(), place, extent)
            rows += comparison_rows(f"{method.name}, {method.precision}", outcome, speed_goal=SPEED_GOAL)
    print_table(
        f"Adapters of rank {RANK} for {model.name}, {workload.name}, {workload.batch} × {workload.length} tokens a "
        f"step, {cores()} CPU cores, {extent.steps} steps × {extent.rounds} rounds",
        "peft loop",
        rows,
    )
