"""The final model as a Hugging Face directory, written by all ranks at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from understudy.checkpoint.durable import sync_directory, sync_tree
from understudy.checkpoint.form import Form
from understudy.checkpoint.shards import Shards
from understudy.contracts import Strategy, TensorSpec

__all__ = ["save_model", "stored_spec"]


def save_model(
    strategy: Strategy,
    directory: Path,
    *,
    rank: int,
    world_size: int,
    form: Form,
    dtype: torch.dtype,
    buffers: Mapping[str, Tensor],
    write_companions: Callable[[Path], None],
) -> None:
    """Writes the weights that `form` keeps as safetensors in `dtype`, one tensor in memory at a time.

    `directory` must not exist and appears whole: it is written beside under another name and renamed at the end.
    `buffers` are persistent buffers, saved as they are; `write_companions` writes configuration and tokenizer, on
    rank 0. A collective: every rank calls it, and all see the same disk. Afterwards `directory` is there on all.
    """
    partial = directory.with_name(directory.name + ".partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    layout = {name: stored_spec(spec, dtype) for name, spec in strategy.layout().items()}
    shards = Shards.of(form, layout, world_size)
    shards.write(partial, rank, strategy.state(shards.owner), buffers if rank == 0 else {})
    if rank == 0:
        write_companions(partial)
    dist.barrier()
    if rank == 0:
        shards.write_index(partial, buffers)
        sync_tree(partial)
        partial.rename(directory)
        sync_directory(directory.parent)
    dist.barrier()


def stored_spec(spec: TensorSpec, dtype: torch.dtype) -> TensorSpec:
    """How a tensor is stored: floating-point ones in `dtype`, others as they are."""
    return TensorSpec(spec.shape, dtype if spec.dtype.is_floating_point else spec.dtype)
