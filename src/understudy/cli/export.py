"""Write a run, a checkpoint, a model or an adapter as a plain directory; merge an adapter into its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from understudy.cli.arguments import base_option, trust_option

if TYPE_CHECKING:
    from understudy.checkpoint.merged_model import Merged
    from understudy.checkpoint.plain_model import Exported

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@click.command
@click.argument("source", metavar="SOURCE", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--merge", is_flag=True, help="Add the adapter to its base's weights, and write these.")
@click.option(
    "--dtype", type=click.Choice([*_DTYPES]), help="Of the weights.  [default: as they are stored; fp32 with --merge]"
)
@base_option
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a line.")
def command(
    source: Path, out: Path, merge: bool, dtype: str | None, base: str | None, trust_remote_code: bool, as_json: bool
) -> None:
    """Write a plain Hugging Face model directory, OUT, which must not exist, and prove that it loads.

    SOURCE is a run (its final model, else its newest checkpoint), a `checkpoints` directory (the newest), a checkpoint,
    or a model or adapter directory. A checkpoint is verified first, and nothing of its optimizer is copied.

    An adapter stays one, and is loaded onto its base with peft. With --merge, OUT is a model that needs no peft: the
    base with the adapter added, computed in fp32, its logits compared with those of base and adapter. A base that is
    quantized is dequantized for that, and --dtype must say to what.

    \b
    Example: understudy export runs/alpaca-smollm2/checkpoints/step-00000100 exported --dtype bf16
             understudy export runs/alpaca-lora merged --merge --dtype bf16
    """
    from understudy.checkpoint.places import examine

    origin, target = source.expanduser(), out.expanduser()
    examine(origin)  # before the imports that take seconds

    import torch

    from understudy.training.inference import quiet_transformers

    quiet_transformers()
    options: dict[str, Any] = {
        "dtype": None if dtype is None else getattr(torch, _DTYPES[dtype]),
        "base": base,
        "trust_remote_code": trust_remote_code,
        "report": lambda line: click.echo(line, err=True),
    }
    if merge:
        from understudy.checkpoint.merged_model import export_merged

        merged = export_merged(origin, target, **options)
        values, line = _merged_values(merged), _merged_line(merged, halved=dtype is None)
    else:
        from understudy.checkpoint.plain_model import export_model

        exported = export_model(origin, target, **options)
        values, line = _exported_values(exported), _exported_line(exported)
    click.echo(json.dumps({"source": str(source), "out": str(out), **values}) if as_json else f"{out}: {line}")


def _exported_values(exported: Exported) -> dict[str, Any]:
    values = {
        "model": str(exported.place.directory),
        "step": exported.step,
        "dtypes": list(exported.dtypes),
        "tensors": exported.tensors,
        "bytes": exported.num_bytes,
    }
    return values if exported.base is None else {**values, "base": str(exported.base)}


def _exported_line(exported: Exported) -> str:
    step = "" if exported.step is None else f" of step {exported.step}"
    loads = "with transformers" if exported.base is None else f"with peft onto {exported.base}"
    return (
        f"{exported.tensors:,} tensors{step} in {', '.join(exported.dtypes)}, {exported.num_bytes:,} bytes; "
        f"read back bit for bit, and loads {loads}"
    )


def _merged_values(merged: Merged) -> dict[str, Any]:
    return {
        "model": str(merged.place.directory),
        "base": str(merged.base),
        "dequantized": merged.dequantized,
        "step": merged.step,
        "dtypes": [merged.dtype],
        "tensors": merged.tensors,
        "bytes": merged.num_bytes,
        "difference": merged.difference,
        "tolerance": merged.tolerance,
        "tokens": merged.tokens,
    }


def _merged_line(merged: Merged, *, halved: bool) -> str:
    step = "" if merged.step is None else f" of step {merged.step}"
    quantized = "" if merged.dequantized is None else f" in {merged.dequantized}"
    dequantized = "" if merged.dequantized is None else f", dequantized from {merged.dequantized}"
    return (
        f"{merged.tensors:,} tensors{step} in {merged.dtype}{dequantized}, {merged.num_bytes:,} bytes"
        + (" (--dtype bf16 halves them)" if halved else "")
        + f"; loads with transformers, and its logits differ from those of {merged.base}{quantized} with the adapter "
        f"by at most {merged.difference:.1e} of the largest, over {merged.tokens} tokens "
        f"({merged.tolerance:.0e} allowed)"
    )
