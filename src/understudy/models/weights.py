"""Weights of a model directory, read by name and by slice, under the names that the built model gives them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from understudy.errors import UserError

__all__ = ["NEW_ROWS", "StoredTensor", "WeightReader", "stored_files"]

NEW_ROWS = "new_rows/rows.safetensors"
"""In a model directory whose vocabulary has grown: by stored name, what follows the stored rows, each time the same;
`vocabulary` in the metadata is the number of rows that they come to."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class StoredTensor:
    """One tensor of a safetensors file, a `LazyTensor`."""

    def __init__(self, handle: Any, key: str) -> None:
        self._handle, self.key = handle, key
        self._slice = handle.get_slice(key)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._slice.get_shape())

    @property
    def dtype(self) -> torch.dtype:
        # A type not known here is some packed one: bytes, to us.
        return _DTYPES.get(self._slice.get_dtype(), torch.uint8)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        whole = not self.shape or index in (slice(None), ())
        part: Tensor = self._handle.get_tensor(self.key) if whole else self._slice[index]
        return part


class GrownTensor(StoredTensor):
    """A stored tensor with `row` (of its shape but for the first dimension) behind it, until it has `length` rows."""

    def __init__(self, handle: Any, key: str, row: Tensor, length: int) -> None:
        super().__init__(handle, key)
        self._row, self._length = row, length

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._length, *super().shape[1:])

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        rows, *columns = (*(index if isinstance(index, tuple) else (index,)), slice(None))[: max(1, len(self.shape))]
        start, stop, step = rows.indices(self._length)
        assert step == 1, "parts are contiguous"
        held, stop = super().shape[0], max(start, stop)
        stored = super().__getitem__((slice(min(start, held), min(stop, held)), *columns))
        row = self._row[tuple(columns)]
        return torch.cat([stored, row.expand(max(stop, held) - max(start, held), *row.shape)])


class WeightReader:
    """Calling it with a Hugging Face parameter name gives a tensor of which only the part asked for is read.

    A name is looked up as it is, then under `aliases` (tied weights: any of them may be the one stored), then with its
    first component removed or a base model's prefix added (checkpoints saved from the base model, or the reverse).
    `renamed` maps names on disk to names in the model, for architectures whose checkpoints name things differently;
    `only` names the one file to read. A directory with `NEW_ROWS` gives the tensors named there longer than stored.
    Raises `UserError` for a directory without readable safetensors. Files stay open as long as the reader lives.
    """

    def __init__(
        self,
        directory: Path,
        *,
        renamed: Mapping[str, str] | None = None,
        aliases: Mapping[str, Iterable[str]] | None = None,
        only: str | None = None,
    ) -> None:
        self.directory = directory
        self._aliases = {name: tuple(names) for name, names in (aliases or {}).items()}
        self._files: dict[str, Path] = {}
        self._keys: dict[str, str] = {}
        self._handles: dict[Path, Any] = {}
        for file in stored_files(directory) if only is None else [directory / only]:
            for key in self._open(file).keys():  # noqa: SIM118  # the handle is no mapping
                name = (renamed or {}).get(key, key)
                self._files[name], self._keys[name] = file, key
        self._new_rows: dict[str, Tensor] = {}
        self._vocabulary = 0
        if only is None and (directory / NEW_ROWS).is_file():
            grown = self._open(directory / NEW_ROWS)
            self._vocabulary = int(grown.metadata()["vocabulary"])
            self._new_rows = {key: grown.get_tensor(key) for key in grown.keys()}  # noqa: SIM118  # no mapping

    def names(self) -> set[str]:
        """Every stored tensor's name, as the model calls it."""
        return set(self._files)

    def __call__(self, name: str) -> StoredTensor:
        found = self._find(name)
        if found is None:
            raise UserError(f"{self.directory} has no weight {name}.")
        handle, key = self._handles[self._files[found]], self._keys[found]
        if key in self._new_rows:
            return GrownTensor(handle, key, self._new_rows[key], self._vocabulary)
        return StoredTensor(handle, key)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises `UserError` that lists every name which is missing, has another shape than `shapes` says, or is not of
        floating-point numbers."""
        missing = [name for name in shapes if name not in self]
        if missing:
            raise UserError(
                f"{self.directory} lacks {_listed(missing)}, of {len(shapes)} weights; name a complete model of this "
                "architecture, or set model.init to random."
            )
        wrong = [
            f"{name} is {list(stored)}, not {list(shape)}"
            for name, shape in shapes.items()
            if (stored := self(name).shape) != tuple(shape)
        ]
        if wrong:
            raise UserError(
                f"{self.directory} does not fit its configuration: {_listed(wrong)}; remove what changes sizes from "
                "model.config, get the model again, or set model.init to random."
            )
        if whole := [name for name in shapes if not self(name).dtype.is_floating_point]:
            raise UserError(
                f"{self.directory} holds whole numbers in {_listed(whole)}, as quantized models do; name the model "
                "that it was made from."
            )

    def _find(self, name: str) -> str | None:
        for candidate in (name, *self._aliases.get(name, ())):
            if candidate in self._files:
                return candidate
            shorter = candidate.partition(".")[2]
            if shorter in self._files:
                return shorter
            for prefix in ("model", "transformer"):
                if f"{prefix}.{candidate}" in self._files:
                    return f"{prefix}.{candidate}"
        return None

    def _open(self, file: Path) -> Any:
        try:
            self._handles[file] = safe_open(file, framework="pt", device="cpu").__enter__()  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"cannot be read as safetensors ({error}); it is truncated or damaged: get the model again.", file=file
            ) from None
        return self._handles[file]


def stored_files(directory: Path) -> list[Path]:
    """The directory's safetensors files: those its index names, else model.safetensors, else all."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [directory / name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError("is not an index of safetensors files; get the model again.", file=index) from None
        if absent := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{directory} lacks {_listed(absent)}, which its index names; get the model again.")
        return files
    single = directory / "model.safetensors"
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory} has no weights (*.safetensors); name a complete model.")
    return files


def _listed(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
