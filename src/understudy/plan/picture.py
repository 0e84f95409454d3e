"""A plan as a picture: bars of what each strategy's peak is made of, in one HTML file or, with matplotlib, as PNG."""

from __future__ import annotations

import html
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from understudy.errors import UserError
from understudy.plan.advice import gibibytes
from understudy.plan.memory.device import COMPONENTS
from understudy.plan.outcome import Plan, Row

__all__ = ["picture_html", "write_picture"]

_COLORS = {
    "weights": "#3b6ea5",
    "gradients": "#7aa6d6",
    "moments": "#1f3f66",
    "gathered": "#8bbf9f",
    "activations": "#e0a64b",
    "head": "#c9743c",
    "communication": "#9b7cb6",
    "teacher": "#6f4f8b",
    "context": "#9aa0a6",
    "fragmentation": "#c9ccd1",
}
_BAR, _GAP, _LEFT, _RIGHT, _WIDTH = 26, 14, 150, 190, 980


def write_picture(plan: Plan, file: Path) -> None:
    """Writes `file`, HTML or PNG by its suffix. Raises `UserError` for another, for PNG without matplotlib, and where
    it cannot be written."""
    suffix = file.suffix.lower()
    if suffix not in (".html", ".png"):
        raise UserError(f"a picture is .html or .png, and {file.name!r:.60} is neither; name one of them.")
    try:
        if suffix == ".html":
            file.write_text(picture_html(plan), encoding="utf-8")
        else:
            _write_png(plan, file)
    except OSError as error:
        raise UserError(f"the picture cannot be written ({error.strerror}); name another file.", file=file) from error


def picture_html(plan: Plan) -> str:
    """A page without scripts and without anything from elsewhere: bars as inline SVG, and the numbers as a table."""
    title = f"{plan.shape.sizes.model_type}, {plan.shape.count:,} parameters, on {plan.hardware.described()}"
    sentences = [plan.why[:1].upper() + plan.why[1:], *([f"What would fit: {plan.lever}"] if plan.lever else [])]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f"<title>{html.escape(title)}</title>",
            "<style>body{font:14px system-ui,sans-serif;margin:2em;max-width:1000px}"
            "table{border-collapse:collapse}td,th{padding:2px 8px;text-align:right}"
            "td:first-child,th:first-child{text-align:left}svg text{font:12px system-ui,sans-serif}</style>",
            "</head><body>",
            f"<h1>{html.escape(title)}</h1>",
            *(f"<p>{html.escape(sentence)}</p>" for sentence in sentences),
            _chart(plan),
            _legend(plan),
            _table(plan),
            "</body></html>",
        ]
    )


def _shown(plan: Plan) -> list[str]:
    return [name for name in COMPONENTS if any(row.breakdown[name] for row in plan.rows)]


def _chart(plan: Plan) -> str:
    most = max(plan.limit_bytes, *(row.device_peak_bytes for row in plan.rows))
    # What is far too large would make everything else too small to see.
    scale = (_WIDTH - _LEFT - _RIGHT) / min(most, 3 * plan.limit_bytes)
    height = len(plan.rows) * (_BAR + _GAP) + 30
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="memory of each strategy">']
    for number, row in enumerate(plan.rows):
        parts.append(_bar(row, 20 + number * (_BAR + _GAP), scale, chosen=row is plan.chosen))
    edge = _LEFT + plan.limit_bytes * scale
    parts.append(
        f'<line x1="{edge:.1f}" y1="14" x2="{edge:.1f}" y2="{height}" stroke="#b00020" stroke-dasharray="4 3"/>'
    )
    parts.append(
        f'<text x="{edge:.1f}" y="11" text-anchor="middle" fill="#b00020">{gibibytes(plan.limit_bytes)}</text>'
    )
    return "".join([*parts, "</svg>"])


def _bar(row: Row, top: int, scale: float, *, chosen: bool) -> str:
    weight = ' font-weight="bold"' if chosen else ""
    middle = top + _BAR / 2 + 4
    parts = [f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end"{weight}>{html.escape(row.name)}</text>']
    left, end = float(_LEFT), float(_WIDTH - _RIGHT)
    for name in COMPONENTS:
        width = min(row.breakdown[name] * scale, end - left)
        if width > 0.05:
            words = f"{name}: {gibibytes(row.breakdown[name])}"
            faded = "" if row.fits else ' opacity="0.45"'
            parts.append(
                f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_BAR}" fill="{_COLORS[name]}"{faded}>'
                f"<title>{words}</title></rect>"
            )
            left += width
    rate = f", {row.tokens_per_second_per_device:,.0f} tokens/s" if row.fits else ", does not fit"
    words = f"{gibibytes(row.device_peak_bytes)}{rate}"
    parts.append(f'<text x="{left + 6:.1f}" y="{middle}"{weight}>{words}</text>')
    return "".join(parts)


def _legend(plan: Plan) -> str:
    marks = (
        f'<span style="white-space:nowrap;margin-right:1em"><span style="display:inline-block;width:12px;height:12px;'
        f'background:{_COLORS[name]}"></span> {name}</span>'
        for name in _shown(plan)
    )
    return f"<p>{''.join(marks)}</p>"


def _table(plan: Plan) -> str:
    shown = _shown(plan)
    head = ["strategy", *shown, "peak", "host", "tokens at once", "checkpointing", "tokens/s a device", "bound by"]
    rows = []
    for row in plan.rows:
        cells = [
            row.name,
            *(gibibytes(row.breakdown[name]) for name in shown),
            gibibytes(row.device_peak_bytes) + ("" if row.fits else " ✗"),
            gibibytes(row.host_peak_bytes),
            f"{row.micro_batch_tokens:,}",
            row.activation_checkpointing,
            f"{row.tokens_per_second_per_device:,.0f}",
            row.bound,
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return "<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>" + "".join(rows) + "</table>"


def _write_png(plan: Plan, file: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "a PNG needs matplotlib, which is not installed; run `pip install matplotlib`, or name a .html file."
        )
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(10, 0.5 * len(plan.rows) + 1.5))
    names = [row.name for row in plan.rows]
    left = [0.0] * len(names)
    for component in _shown(plan):
        widths = [row.breakdown[component] / 2**30 for row in plan.rows]
        axes.barh(names, widths, left=left, color=_COLORS[component], label=component)
        left = [start + width for start, width in zip(left, widths)]
    axes.axvline(plan.limit_bytes / 2**30, color="#b00020", linestyle="--")
    axes.set_xlabel("GiB a device")
    axes.set_title(f"{plan.shape.sizes.model_type} on {plan.hardware.described()}")
    axes.invert_yaxis()
    axes.legend(fontsize="small", ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(file, dpi=120, bbox_inches="tight")
