"""Writes a safetensors file one tensor at a time, so that a rank never holds more than one of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from understudy.checkpoint.manifest import FileEntry
from understudy.contracts import TensorSpec

__all__ = ["SafetensorsWriter", "spec_bytes"]

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT_BYTES = 8
CHUNK_BYTES = 2**20


def spec_bytes(spec: TensorSpec) -> int:
    """Bytes that a tensor's values take."""
    return int(torch.Size(spec.shape).numel()) * spec.dtype.itemsize


class SafetensorsWriter:
    """Writes the tensors of `layout`, in its order, to `path`, which appears whole or not at all.

    The format's header needs only names, shapes and dtypes, so it is written before any tensor exists
    (https://huggingface.co/docs/safetensors, "Format"). A context manager: leaving it without an exception flushes the
    file to disk and renames it into place; leaving it with one removes what was written.
    """

    def __init__(self, path: Path, layout: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._layout = layout
        self._metadata = dict(metadata or {})
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    @property
    def entry(self) -> FileEntry:
        """Size and digest of what was written."""
        return FileEntry(self._num_bytes, self._digest.hexdigest())

    def __enter__(self) -> SafetensorsWriter:
        self._file = self._partial.open("wb", buffering=0)
        try:
            self._put(memoryview(_header(self._layout, self._metadata)))
        except BaseException:  # `__exit__` is for those who have entered
            self._file.close()
            self._partial.unlink()
            raise
        self._expected = iter(self._layout.items())
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor of the layout, on the CPU. Raises `ValueError` when it is another or has another shape or
        dtype than announced."""
        expected_name, spec = next(self._expected, (None, None))
        if spec is None or (name, tuple(tensor.shape), tensor.dtype) != (expected_name, spec.shape, spec.dtype):
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} given, {expected_name} {spec} expected")
        self._put(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _put(self, content: memoryview) -> None:
        """In chunks, so that what is hashed is still in the processor's cache when it is written."""
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start : start + CHUNK_BYTES]
            self._digest.update(chunk)
            self._num_bytes += len(chunk)
            while chunk:
                chunk = chunk[self._file.write(chunk) :]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if error is None and (missing := next(self._expected, None)) is not None:
                error = ValueError(f"{missing[0]} was never written")
            if error is None:
                os.fsync(self._file.fileno())
        if error is None:
            self._partial.replace(self._path)
            return
        self._partial.unlink()
        if kind is None:
            raise error


def _header(layout: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, spec in layout.items():
        end = offset + spec_bytes(spec)
        entries[name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text
