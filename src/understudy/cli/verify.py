"""Check that a checkpoint or a model is whole, and that it loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from understudy.cli.arguments import base_option, trust_option

if TYPE_CHECKING:
    from understudy.checkpoint.verification import Verified


@click.command
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@base_option
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def command(directory: Path, base: str | None, trust_remote_code: bool, as_json: bool) -> int:
    """Check that a checkpoint is what was written, every byte, and that its model and tokenizer load with transformers.

    DIR is a checkpoint, a run or its `checkpoints` directory (each of them is checked, and the final model), or a model
    or adapter directory, which has no manifest and is only loaded. Status 2 when anything is damaged; all is checked
    first.

    An adapter is loaded onto its base with peft. Where the base is not what the adapter refers to, or is gone, the
    adapter is read to its last byte, a note says what could not be tried, and the status stays 0: it is not damaged.
    A base that is named with --base must be the one.

    Example: understudy verify runs/alpaca-smollm2
    """
    from understudy.checkpoint.places import examine

    path = directory.expanduser()
    examine(path)  # before the imports that take seconds

    from understudy.checkpoint.verification import verify_directory
    from understudy.training.inference import quiet_transformers

    quiet_transformers()
    rows = []
    for verified in verify_directory(path, trust_remote_code=trust_remote_code, report=_report, base=base):
        rows.append(_row(verified))
        if verified.problem is not None:
            click.echo(f"error: {verified.problem}", err=True)
        elif not as_json:
            click.echo(_line(verified))
        if verified.note is not None:
            click.echo(f"note: {verified.note}", err=True)
    whole = all(row["problem"] is None for row in rows)
    if as_json:
        click.echo(json.dumps({"directory": str(directory), "whole": whole, "verified": rows}))
    return 0 if whole else 2


def _line(verified: Verified) -> str:
    what = "" if verified.step is None else f"step {verified.step}, every byte as it was written, "
    loads = "loads" if verified.note is None else "reads"
    return f"{verified.path}: {what}{loads}, {verified.num_bytes:,} bytes in {verified.seconds:.1f} s"


def _row(verified: Verified) -> dict[str, Any]:
    return {
        "path": str(verified.path),
        "step": verified.step,
        "bytes": verified.num_bytes,
        "seconds": round(verified.seconds, 3),
        "problem": None if verified.problem is None else str(verified.problem),
        "note": verified.note,
    }


def _report(line: str) -> None:
    click.echo(line, err=True)
