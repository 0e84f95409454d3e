"""A plain model or adapter directory, with nothing in it but what loading needs, from a run or a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from understudy.checkpoint.adapter_base import AdapterBase, find_base
from understudy.checkpoint.companion_files import copy_files, other_files, set_dtype
from understudy.checkpoint.durable import sync_tree
from understudy.checkpoint.export import stored_spec
from understudy.checkpoint.form import WHOLE_MODEL, Form
from understudy.checkpoint.made_whole import made_whole, refuse_place
from understudy.checkpoint.places import CONFIG, ModelPlace, find_model
from understudy.checkpoint.reloading import (
    UnloadableModelError,
    has_tokenizer,
    reload_adapter,
    reload_model,
    reload_tokenizer,
)
from understudy.checkpoint.safetensors_writer import DTYPES
from understudy.checkpoint.shards import Shards
from understudy.checkpoint.store import verify_checkpoint
from understudy.checkpoint.weight_files import SHARD_BYTES, as_stored, in_files, write_files
from understudy.contracts import TensorSpec
from understudy.errors import UnderstudyError, UserError
from understudy.models.adapters import directory as adapters
from understudy.models.source import read_config_file
from understudy.models.weights import StoredTensor, WeightReader

__all__ = ["Exported", "copy_companions", "export_model"]

SMALL_BYTES = 2**20
"""Room for headers and the index."""


@dataclass(frozen=True)
class Exported:
    place: ModelPlace
    """What was exported."""
    step: int | None
    """Of the checkpoint it is part of."""
    dtypes: tuple[str, ...]
    """Of the weights, as PyTorch calls them."""
    tensors: int
    num_bytes: int
    """All files together."""
    base: Path | None
    """Of an adapter: the model that it was loaded onto."""


class _AdapterFile:
    """An adapter's parameters under the keys that they have: in one file, since peft reads one."""

    stem = adapters.WEIGHTS.removesuffix(".safetensors")
    spread = False
    keeps_buffers = False

    def keeps(self, name: str) -> bool:
        return True

    def specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {name: spec}

    def parts(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        return [(name, tensor)]


def export_model(
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    report: Callable[[str], None],
    base: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Writes the model or adapter that `source` stands for (`find_model`) to `out`, and proves it.

    Weights are stored in `dtype` where they are floating-point numbers, else bit for bit as they are; one tensor is in
    memory at a time. All other files come along, but no pickles and no further weights; `report` is told of those. A
    checkpoint is verified first. `out` must not exist and appears whole, once every weight was read back and the model
    loads with transformers, which takes as much memory as the model. An adapter is loaded with peft onto its base,
    which `base` names where it is not where the adapter says.

    Raises `UserError` for a `source` that is no model, damaged or quantized where `dtype` is given, for an `out` that
    exists or lies where it must not, for values too large for `dtype`, when the disk has no room, and without a base.
    """
    if out.exists() or out.is_symlink():
        raise UserError("exists, and nothing is overwritten; name a directory that does not exist.", file=out)
    place = find_model(source, report)
    refuse_place(source, place, out)
    found = _base_of(place.directory, base, report)
    step = None if place.checkpoint is None else verify_checkpoint(place.checkpoint).step
    form: Form = WHOLE_MODEL if found is None else _AdapterFile()
    reader = _reader(place.directory)
    shards = in_files(form, _layout(reader, place.directory, dtype), shard_bytes)
    others = list(other_files(place.directory, form.stem, report))
    needed_bytes = shards.num_bytes + sum(file.stat().st_size for file in others) + SMALL_BYTES
    with made_whole(out, needed_bytes) as partial:
        write_files(shards, partial, lambda name: _cast(reader, name, shards.layout[name]))
        _copy(place.directory, others, partial, dtype if found is None else None)
        sync_tree(partial)
        _compare(reader, shards, partial)
        _reload(partial, place.directory, found, trust_remote_code)
        num_bytes = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in shards.layout.values()})
    return Exported(
        place, step, tuple(dtypes), len(shards.layout), num_bytes, None if found is None else found.original
    )


def _base_of(directory: Path, named: str | None, report: Callable[[str], None]) -> AdapterBase | None:
    if adapters.is_adapter(directory):
        adapters.open_adapter(directory)
        return find_base(directory, named, report)
    if named is not None:
        raise UserError(f"{directory} is a whole model, not an adapter, so no base goes with it; leave --base out.")
    return None


def _reader(directory: Path) -> WeightReader:
    return WeightReader(directory, only=adapters.WEIGHTS if adapters.is_adapter(directory) else None)


def _layout(reader: WeightReader, directory: Path, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    """How every tensor is stored."""
    if (
        dtype is not None
        and not adapters.is_adapter(directory)
        and read_config_file(directory).get("quantization_config")
    ):
        raise UserError(
            "is of a quantized model, whose weights mean nothing in another dtype; export it without --dtype.",
            file=directory / CONFIG,
        )
    layout = {}
    for name in reader.names():
        stored = reader(name)
        spec = TensorSpec(stored.shape, _dtype_of(stored))
        if spec.dtype not in DTYPES:
            raise UserError(f"{directory} holds {name} in {spec.dtype}, which this release does not write.")
        layout[name] = spec if dtype is None else stored_spec(spec, dtype)
    return layout


def _dtype_of(stored: StoredTensor) -> torch.dtype:
    # A reader calls types that it does not know bytes; a part says what it is.
    if stored.dtype is torch.uint8 and stored.shape:
        return stored[0:0].dtype
    return stored.dtype


def _cast(reader: WeightReader, name: str, spec: TensorSpec) -> Tensor:
    return as_stored(name, reader(name)[:], spec.dtype, reader.directory)


def _compare(reader: WeightReader, shards: Shards, written: Path) -> None:
    """Raises `UnderstudyError` unless every weight in `written` has the bits it should have."""
    stored = _reader(written)
    for name, spec in shards.layout.items():
        if not torch.equal(_bits(stored(name)[:]), _bits(_cast(reader, name, spec))):
            raise UnderstudyError(f"{name} was not stored in {written} as it was given: the disk may be failing.")


def _reload(written: Path, source: Path, base: AdapterBase | None, trust_remote_code: bool) -> None:
    """Raises `UnloadableModelError` with `source` at fault: of `written`, nothing will be left."""
    model = reload_model(base.directory, dtype="auto", trust_remote_code=trust_remote_code) if base else None
    try:
        if model is None:
            reload_model(written, dtype="auto", trust_remote_code=trust_remote_code)
        else:
            reload_adapter(model, written)
        # peft saves adapters without one; then the base's is used.
        if base is None or has_tokenizer(written):
            reload_tokenizer(written, trust_remote_code=trust_remote_code)
    except UnloadableModelError as error:
        raise UnloadableModelError(error.message, file=source) from error


def _bits(tensor: Tensor) -> Tensor:
    """As bytes, for NaN is not equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def copy_companions(directory: Path, out: Path, dtype: torch.dtype) -> None:
    """Copies what stands beside the weights of the model in `directory`; those in `out` are of `dtype`."""
    _copy(directory, list(other_files(directory, WHOLE_MODEL.stem, lambda line: None)), out, dtype)


def _copy(directory: Path, files: list[Path], out: Path, dtype: torch.dtype | None) -> None:
    copy_files(directory, files, out)
    if dtype is not None:
        config = read_config_file(directory)
        set_dtype(config, str(dtype).removeprefix("torch."))
        (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
