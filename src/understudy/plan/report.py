"""A plan as lines of text: a table of strategies, and what is to be said about them."""

from __future__ import annotations

from collections.abc import Sequence

from understudy.plan.advice import gibibytes
from understudy.plan.outcome import Plan, Row
from understudy.recipe.schema import DeepSpeed

__all__ = ["report_lines"]

_SHORT = {
    "weights": "weights",
    "gradients": "grads",
    "moments": "moments",
    "gathered": "gathered",
    "activations": "activ.",
    "head": "head",
    "communication": "comm.",
    "teacher": "teacher",
    "context": "context",
    "fragmentation": "fragm.",
}


def report_lines(plan: Plan) -> list[str]:
    """What a terminal shows: the machine, the model, every strategy with the parts of its peak in GiB, and why."""
    sizes, shape = plan.shape.sizes, plan.shape
    trained = "" if plan.trained == shape.count else f", of which {plan.trained:,} are trained"
    parts = [name for name in _SHORT if any(row.breakdown[name] for row in plan.rows)]
    head = [
        "",
        "strategy",
        "peak",
        "of which",
        *[""] * (len(parts) - 1),
        "host",
        "tokens",
        "checkpointing",
        "tokens/s",
        "bound by",
    ]
    names = ["", "", "GiB", *(_SHORT[name] for name in parts), "GiB", "at once", "", "a device", ""]
    rows = [_cells(row, parts, mark="→" if row is plan.chosen else " ") for row in plan.rows]
    lines = [
        f"{plan.hardware.described()}: {gibibytes(plan.limit_bytes)} a device can be used; precision {plan.precision}",
        f"{sizes.model_type}: {shape.count:,} parameters in {sizes.layers} layers{trained}",
        "",
        *_aligned([head, names, *rows]),
    ]
    unfit = [f"  {row.name} does not fit: {row.reason}" for row in plan.rows if not row.fits and not row.refused]
    unfit += [f"  {row.name} cannot be taken: {row.reason}" for row in plan.rows if row.refused]
    small = [row.name for row in plan.rows if isinstance(row.strategy, DeepSpeed) and row.strategy.buckets == "small"]
    unfit += [f"  with small buckets: {', '.join(small)}"] if small else []
    unfit += [
        f"  {row.name} puts {gibibytes(row.disk_bytes)} on each host's disk" for row in plan.rows if row.disk_bytes
    ]
    lines += ["", *unfit] if unfit else []
    lines += ["", plan.why[:1].upper() + plan.why[1:]]
    if plan.lever:
        lines.append(f"What would fit: {plan.lever}")
    return lines


def _cells(row: Row, parts: Sequence[str], *, mark: str) -> list[str]:
    return [
        mark,
        row.name,
        f"{row.device_peak_bytes / 2**30:,.1f}{'' if row.fits else ' ✗'}",
        *(f"{row.breakdown[name] / 2**30:,.1f}" for name in parts),
        f"{row.host_peak_bytes / 2**30:,.0f}",
        f"{row.micro_batch_tokens:,}",
        row.activation_checkpointing,
        f"{row.tokens_per_second_per_device:,.0f}",
        row.bound,
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Words to the left, numbers to the right."""
    columns = list(zip(*rows))
    widths = [max(map(len, column)) for column in columns]
    numeric = [any(cell[:1].isdigit() for cell in column) for column in columns]
    return [
        " ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric)
        ).rstrip()
        for row in rows
    ]
