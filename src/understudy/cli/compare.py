"""Show the results of several runs side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from understudy.errors import UserError

Values = Mapping[str, float]

_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "step": ("steps", "{:,.0f}".format),
    "eval_cross_entropy": ("evaluation cross-entropy", "{:.4f}".format),
    "eval_perplexity": ("perplexity", "{:.3f}".format),
    "eval_token_accuracy": ("token accuracy", "{:.1%}".format),
    "eval_exact_match": ("exact match", "{:.1%}".format),
    "eval_divergence": ("divergence from the teacher", "{:.4f}".format),
    "eval_teacher_agreement": ("agreement with the teacher", "{:.1%}".format),
    "eval_calibration_error": ("calibration error", "{:.3f}".format),
    "loss": ("last training loss", "{:.4f}".format),
    "tokens_per_second": ("tokens a second", "{:,.0f}".format),
    "memory_peak_bytes": ("peak memory, bytes", "{:,.0f}".format),
}


@click.command
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(runs: tuple[Path, ...], as_json: bool) -> None:
    """Show the results of several runs side by side: their last evaluation, speed and memory.

    RUN is a run directory. Cross-entropy and perplexity are the same thing for every objective; a loss is not.

    Example: understudy compare runs/quickstart-from-data runs/quickstart-distill
    """
    names = [str(run) for run in runs]
    found = [_figures(run.expanduser()) for run in runs]
    if as_json:
        click.echo(json.dumps({"runs": [{"run": name, **values} for name, values in zip(names, found)]}))
        return
    rows = [["", *(run.name for run in runs)]]
    for key, (title, shown) in _FIGURES.items():
        if any(key in values for values in found):
            rows.append([title, *(shown(values[key]) if key in values else "–" for values in found)])
    for line in _aligned(rows):
        click.echo(line)


def _figures(run: Path) -> Values:
    """Of the last logged step and the last evaluation."""
    last: dict[str, float] = {}
    for row in _rows(run / "metrics.jsonl"):
        last.update(row)
    if "eval_loss" in last:  # of an objective with one part, which it is
        last.setdefault("eval_cross_entropy", last["eval_loss"])
    return {key: last[key] for key in _FIGURES if key in last}


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror}); name the directory of a run that has logged to `jsonl`.", file=file
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break  # a run that is writing it now, or was killed
            raise UserError("is not a row of metrics; was it edited?", file=file, line=number) from error
    if not rows:
        raise UserError("has no row yet; wait for the run's first step.", file=file)
    return rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
