"""The final model as a Hugging Face directory, written by all ranks at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from understudy.checkpoint.ownership import assign_owners
from understudy.checkpoint.safetensors_writer import SafetensorsWriter, spec_bytes
from understudy.contracts import Strategy, TensorSpec

__all__ = ["save_model", "stored_spec"]


def save_model(
    strategy: Strategy,
    directory: Path,
    *,
    rank: int,
    world_size: int,
    dtype: torch.dtype,
    buffers: Mapping[str, Tensor],
    write_companions: Callable[[Path], None],
) -> None:
    """Writes weights as safetensors in `dtype`, each rank its own shard, one tensor in memory at a time.

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
    owners = assign_owners(layout, world_size)
    shards = _shard_names(sorted(set(owners.values())))
    _write_shard(strategy, partial, layout, owners, shards, rank, buffers if rank == 0 else {})
    if rank == 0:
        write_companions(partial)
    dist.barrier()
    if rank == 0:
        names = {**{name: shards[owners[name]] for name in layout}, **dict.fromkeys(buffers, shards[0])}
        if len(shards) > 1:
            _write_index(partial, names, sum(map(spec_bytes, layout.values())))
        _sync(partial)
        partial.rename(directory)
        _sync(directory.parent)
    dist.barrier()


def stored_spec(spec: TensorSpec, dtype: torch.dtype) -> TensorSpec:
    """How a tensor is stored: floating-point ones in `dtype`, others as they are."""
    return TensorSpec(spec.shape, dtype if spec.dtype.is_floating_point else spec.dtype)


def _shard_names(ranks: list[int]) -> dict[int, str]:
    if len(ranks) == 1:
        return {ranks[0]: "model.safetensors"}
    return {rank: f"model-{i:05}-of-{len(ranks):05}.safetensors" for i, rank in enumerate(ranks, start=1)}


def _write_shard(
    strategy: Strategy,
    directory: Path,
    layout: Mapping[str, TensorSpec],
    owners: Mapping[str, int],
    shards: Mapping[int, str],
    rank: int,
    buffers: Mapping[str, Tensor],
) -> None:
    """Every rank walks through the strategy's state, because that is a collective; owners write."""
    state = strategy.state(owners.__getitem__)
    if rank not in shards:
        for _ in state:
            raise AssertionError("a rank that owns nothing was given a tensor")
        return
    mine = {name: spec for name, spec in layout.items() if owners[name] == rank}
    mine.update({name: TensorSpec(tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()})
    # transformers refuses files that do not say which framework wrote them.
    with SafetensorsWriter(directory / shards[rank], mine, {"format": "pt"}) as writer:
        for name, tensor in state:
            writer.write(name, tensor.to(layout[name].dtype))
        for name, buffer in buffers.items():
            writer.write(name, buffer)


def _write_index(directory: Path, shards: Mapping[str, str], total_bytes: int) -> None:
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(shards.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _sync(directory: Path) -> None:
    """Makes the directory's small files and its entries last through a power cut."""
    for path in [*directory.glob("*.json"), *directory.glob("*.jinja"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
