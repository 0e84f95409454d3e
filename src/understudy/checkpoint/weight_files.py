"""How the weights of a model that is exported are stored: in which file, and in which dtype."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from understudy.checkpoint.form import Form
from understudy.checkpoint.manifest import FileEntry
from understudy.checkpoint.safetensors_writer import spec_bytes
from understudy.checkpoint.shards import Shards
from understudy.contracts import TensorSpec
from understudy.errors import UserError

__all__ = ["SHARD_BYTES", "as_stored", "in_files", "write_files"]

SHARD_BYTES = 5 * 10**9
"""Tensors of a file, unless one alone is larger: what the Hub and its tools handle well."""
_DIGITS = re.compile(r"(\d+)")


def in_files(form: Form, layout: Mapping[str, TensorSpec], shard_bytes: int) -> Shards:
    """Every tensor of `layout`, in the order of layers, in files of at most `shard_bytes`, or one, as `form` says."""
    ordered = {name: layout[name] for name in sorted(layout, key=_natural)}
    owners, used_bytes, shard = {}, 0, 0
    for name, spec in ordered.items():
        size = spec_bytes(spec)
        if form.spread and used_bytes and used_bytes + size > shard_bytes:
            shard, used_bytes = shard + 1, 0
        owners[name] = shard
        used_bytes += size
    return Shards(form, ordered, owners)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(name)]


def as_stored(name: str, tensor: Tensor, dtype: torch.dtype, source: Path) -> Tensor:
    """`tensor` in `dtype`. Raises `UserError`, about `source`, for values that are too large for it."""
    if tensor.dtype is dtype:
        return tensor
    cast = tensor.to(dtype)
    if not torch.equal(torch.isfinite(cast), torch.isfinite(tensor)):
        kind = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{name} has values up to {tensor[torch.isfinite(tensor)].abs().max():.3g}, too large for {kind}; take "
            "another --dtype, such as bf16.",
            file=source,
        )
    return cast


def write_files(shards: Shards, directory: Path, tensor: Callable[[str], Tensor]) -> dict[str, FileEntry]:
    """Writes all of `shards`, and the index where there are several files; `tensor` gives one after another, in the
    dtype in which it is stored. Returns what each file should hold."""
    entries: dict[str, FileEntry] = {}
    for shard in shards.files:
        names = [name for name in shards.layout if shards.owners[name] == shard]
        entries |= shards.write(directory, shard, ((name, tensor(name)) for name in names), {})
    shards.write_index(directory, ())
    return entries
