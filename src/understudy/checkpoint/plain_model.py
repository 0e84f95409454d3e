"""A plain model directory from a run, a checkpoint or another model, with nothing in it but what loading needs."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.checkpoint.durable import sync_directory, sync_tree
from understudy.checkpoint.export import stored_spec
from understudy.checkpoint.form import WHOLE_MODEL
from understudy.checkpoint.places import CONFIG, ModelPlace, find_model
from understudy.checkpoint.reloading import UnloadableModelError, reload_model, reload_tokenizer
from understudy.checkpoint.safetensors_writer import DTYPES, spec_bytes
from understudy.checkpoint.shards import Shards
from understudy.checkpoint.store import CheckpointStore, verify_checkpoint
from understudy.contracts import TensorSpec
from understudy.errors import UnderstudyError, UserError, is_full_disk
from understudy.models.source import read_config_file
from understudy.models.weights import StoredTensor, WeightReader

__all__ = ["Exported", "copy_companions", "export_model"]

SHARD_BYTES = 5 * 10**9
"""Tensors of a file, unless one alone is larger: what the Hub and its tools handle well."""
SMALL_BYTES = 2**20
"""Room for headers and the index."""
DTYPE_KEYS = ("dtype", "torch_dtype")
"""Under which config.json tells the dtype of the weights; the second until transformers 4.56."""
WEIGHTS = (".safetensors", ".safetensors.index.json")
NEVER_COPIED = (
    *(".bin", ".ckpt", ".dill", ".joblib", ".mar", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"),  # pickles
    *(".gguf", ".h5", ".index.json", ".msgpack", ".onnx", ".onnx_data", ".safetensors"),  # other weights
)
_DIGITS = re.compile(r"(\d+)")


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


def export_model(
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    report: Callable[[str], None],
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Writes the model that `source` stands for (`find_model`) to `out`, and proves it.

    Weights are stored in `dtype` where they are floating-point numbers, else bit for bit as they are; one tensor is in
    memory at a time. All other files come along, but no pickles and no further weights; `report` is told of those. A
    checkpoint is verified first. `out` must not exist and appears whole, once every weight was read back and the model
    loads with transformers, which takes as much memory as the model.

    Raises `UserError` for a `source` that is no model, damaged or quantized where `dtype` is given, for an `out` that
    exists or lies where it must not, for values too large for `dtype`, and when the disk has no room.
    """
    if out.exists() or out.is_symlink():
        raise UserError("exists, and nothing is overwritten; name a directory that does not exist.", file=out)
    place = find_model(source, report)
    _refuse_inside(source, place, out)
    step = None if place.checkpoint is None else verify_checkpoint(place.checkpoint).step
    reader = WeightReader(place.directory)
    shards = _shards(reader, place.directory, dtype, shard_bytes)
    others = list(_other_files(place.directory, report))
    needed_bytes = shards.num_bytes + sum(file.stat().st_size for file in others) + SMALL_BYTES
    with _made_whole(out, needed_bytes) as partial:
        for shard in shards.files:
            names = [name for name in shards.layout if shards.owners[name] == shard]
            shards.write(partial, shard, ((name, _cast(reader, name, shards.layout[name])) for name in names), {})
        shards.write_index(partial, ())
        _copy(place.directory, others, partial, dtype)
        sync_tree(partial)
        _compare(reader, shards.layout, partial)
        _reload(partial, place.directory, trust_remote_code)
        num_bytes = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in shards.layout.values()})
    return Exported(place, step, tuple(dtypes), len(shards.layout), num_bytes)


def _refuse_inside(source: Path, place: ModelPlace, out: Path) -> None:
    target = out.resolve()
    for directory in (source, place.checkpoint or source):
        if target.is_relative_to(directory.resolve()):
            raise UserError(f"is inside {directory}, which is to be exported; name a directory elsewhere.", file=out)
    for parent in target.parents:
        if CheckpointStore(parent).committed():
            raise UserError(
                f"is among the checkpoints of {parent}, which training clears; name a directory elsewhere.", file=out
            )


def _shards(reader: WeightReader, directory: Path, dtype: torch.dtype | None, shard_bytes: int) -> Shards:
    """How every tensor is stored, in the order of layers, and in which file."""
    if dtype is not None and read_config_file(directory).get("quantization_config"):
        raise UserError(
            "is of a quantized model, whose weights mean nothing in another dtype; export it without --dtype.",
            file=directory / CONFIG,
        )
    layout = {}
    for name in sorted(reader.names(), key=_natural):
        stored = reader(name)
        spec = TensorSpec(stored.shape, _dtype_of(stored))
        if spec.dtype not in DTYPES:
            raise UserError(f"{directory} holds {name} in {spec.dtype}, which this release does not write.")
        layout[name] = spec if dtype is None else stored_spec(spec, dtype)
    owners, used_bytes, shard = {}, 0, 0
    for name, spec in layout.items():
        size = spec_bytes(spec)
        if used_bytes and used_bytes + size > shard_bytes:
            shard, used_bytes = shard + 1, 0
        owners[name] = shard
        used_bytes += size
    return Shards(WHOLE_MODEL, layout, owners)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(name)]


def _dtype_of(stored: StoredTensor) -> torch.dtype:
    # A reader calls types that it does not know bytes; a part says what it is.
    if stored.dtype is torch.uint8 and stored.shape:
        return stored[0:0].dtype
    return stored.dtype


def _cast(reader: WeightReader, name: str, spec: TensorSpec) -> Tensor:
    tensor = reader(name)[:]
    if tensor.dtype is spec.dtype:
        return tensor
    cast = tensor.to(spec.dtype)
    if not torch.equal(torch.isfinite(cast), torch.isfinite(tensor)):
        kind = str(spec.dtype).removeprefix("torch.")
        raise UserError(
            f"{name} has values up to {tensor[torch.isfinite(tensor)].abs().max():.3g}, too large for {kind}; take "
            "another --dtype, such as bf16.",
            file=reader.directory,
        )
    return cast


def _compare(reader: WeightReader, layout: Mapping[str, TensorSpec], written: Path) -> None:
    """Raises `UnderstudyError` unless every weight in `written` has the bits it should have."""
    stored = WeightReader(written)
    for name, spec in layout.items():
        if not torch.equal(_bits(stored(name)[:]), _bits(_cast(reader, name, spec))):
            raise UnderstudyError(f"{name} was not stored in {written} as it was given: the disk may be failing.")


def _reload(written: Path, source: Path, trust_remote_code: bool) -> None:
    """Raises `UnloadableModelError` with `source` at fault: of `written`, nothing will be left."""
    try:
        reload_model(written, dtype="auto", trust_remote_code=trust_remote_code)
        reload_tokenizer(written, trust_remote_code=trust_remote_code)
    except UnloadableModelError as error:
        raise UnloadableModelError(error.message, file=source) from error


def _bits(tensor: Tensor) -> Tensor:
    """As bytes, for NaN is not equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _other_files(directory: Path, report: Callable[[str], None]) -> Iterator[Path]:
    """What to copy; hidden files are passed over."""
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if not path.is_file() or any(part.startswith(".") for part in name.parts) or "__pycache__" in name.parts:
            continue
        if not path.name.endswith(NEVER_COPIED):
            yield path
        elif not (path.parent == directory and path.name.startswith("model") and path.name.endswith(WEIGHTS)):
            report(f"left out: {path}")


def copy_companions(directory: Path, out: Path, dtype: torch.dtype) -> None:
    """Copies what stands beside the weights of the model in `directory`; those in `out` are of `dtype`."""
    _copy(directory, list(_other_files(directory, lambda line: None)), out, dtype)


def _copy(directory: Path, files: list[Path], out: Path, dtype: torch.dtype | None) -> None:
    for file in files:
        target = out / file.relative_to(directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    if dtype is not None:
        config = read_config_file(directory)
        _set_dtype(config, str(dtype).removeprefix("torch."))
        (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Wherever `config` tells it, also of a model's parts (`text_config`)."""
    for key, value in config.items():
        if key in DTYPE_KEYS:
            config[key] = dtype
        elif key.endswith("_config") and isinstance(value, dict):
            _set_dtype(value, dtype)


@contextmanager
def _made_whole(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A new directory that gets the name `out` when the block ends well, and leaves nothing behind when it does not."""
    created: list[Path] = []
    partial: Path | None = None
    try:
        _require_space(out, needed_bytes)
        created = _make_parents(out)
        partial = out.with_name(f"{out.name}.{secrets.token_hex(4)}.partial")
        partial.mkdir()
        yield partial
        partial.rename(out)
        sync_directory(out.parent)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for directory in created:
            with suppress(OSError):
                directory.rmdir()
        if is_full_disk(error):
            raise _no_space(out, needed_bytes) from error
        if isinstance(error, OSError):
            raise UserError(
                f"cannot be read or written ({error.strerror or error}).", file=error.filename or out
            ) from error
        raise


def _make_parents(out: Path) -> list[Path]:
    """Creates what `out` is to be in. Returns what it created, innermost first."""
    there = _nearest(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    return [parent for parent in out.absolute().parents if there in parent.parents]


def _nearest(out: Path) -> Path:
    """The innermost directory around `out` that exists."""
    return next(parent for parent in out.absolute().parents if parent.exists())


def _require_space(out: Path, needed_bytes: int) -> None:
    if shutil.disk_usage(_nearest(out)).free < needed_bytes:
        raise _no_space(out, needed_bytes)


def _no_space(out: Path, needed_bytes: int) -> UserError:
    directory = _nearest(out)
    return UserError(
        f"the disk has no room: the model needs {needed_bytes:,} bytes and {shutil.disk_usage(directory).free:,} are "
        "free; free some space or name a directory on another disk.",
        file=directory,
    )
