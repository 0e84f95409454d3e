"""Write a run, a checkpoint or a model as a plain model directory."""

from __future__ import annotations

import json
from pathlib import Path

import click

from understudy.cli.arguments import trust_option

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@click.command
@click.argument("source", metavar="SOURCE", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice([*_DTYPES]), help="Of the weights.  [default: as they are stored]")
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a line.")
def command(source: Path, out: Path, dtype: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Write a plain Hugging Face model directory, OUT, which must not exist, and prove that it loads.

    SOURCE is a run (its final model, else its newest checkpoint), a `checkpoints` directory (the newest), a checkpoint,
    or a model directory. A checkpoint is verified first, and nothing of its optimizer is copied.

    Example: understudy export runs/alpaca-smollm2/checkpoints/step-00000100 exported --dtype bf16
    """
    from understudy.checkpoint.places import examine

    origin, target = source.expanduser(), out.expanduser()
    examine(origin)  # before the imports that take seconds

    import torch

    from understudy.checkpoint.plain_model import export_model
    from understudy.training.inference import quiet_transformers

    quiet_transformers()
    exported = export_model(
        origin,
        target,
        dtype=None if dtype is None else getattr(torch, _DTYPES[dtype]),
        trust_remote_code=trust_remote_code,
        report=lambda line: click.echo(line, err=True),
    )
    if as_json:
        values = {
            "source": str(source),
            "model": str(exported.place.directory),
            "step": exported.step,
            "out": str(out),
            "dtypes": list(exported.dtypes),
            "tensors": exported.tensors,
            "bytes": exported.num_bytes,
        }
        click.echo(json.dumps(values))
    else:
        step = "" if exported.step is None else f" of step {exported.step}"
        click.echo(
            f"{out}: {exported.tensors:,} tensors{step} in {', '.join(exported.dtypes)}, {exported.num_bytes:,} bytes; "
            "read back bit for bit, and loads with transformers"
        )
