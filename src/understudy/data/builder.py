"""Builds entries of the token cache: one builder at a time, in a directory beside, renamed when whole. No torch."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from understudy.data.cache import EXAMPLES_FILE, FORMAT_VERSION, INDEX_FILE, SCHEMA, DamagedCacheError, TokenCache
from understudy.recipe.cache_disk import writing_cache

__all__ = ["CacheWriter", "TokenChunk", "open_or_build"]


@dataclass(frozen=True)
class TokenChunk:
    """Tokenised examples in order, end to end: T tokens of E examples."""

    tokens: npt.NDArray[np.int32]
    """[T]"""
    supervised: npt.NDArray[np.uint8]
    """[T] 1 where supervised."""
    lengths: npt.NDArray[np.int32]
    """[E]"""
    num_supervised: npt.NDArray[np.int32]
    """[E] without a supervised first token, which nothing predicts."""
    row: npt.NDArray[np.int64]
    """[E] row of the source, from 0."""
    source: int


class CacheWriter:
    """Writes one entry's files into an empty directory; `finish` makes it whole."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: BinaryIO = (directory / EXAMPLES_FILE).open("xb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._examples = 0

    def append(self, chunk: TokenChunk) -> None:
        count = len(chunk.lengths)
        if not count:
            return
        offsets = pa.array(np.concatenate([np.zeros(1, np.int32), np.cumsum(chunk.lengths, dtype=np.int32)]))
        columns = [
            pa.ListArray.from_arrays(offsets, pa.array(chunk.tokens), type=SCHEMA.field("tokens").type),
            pa.ListArray.from_arrays(offsets, pa.array(chunk.supervised), type=SCHEMA.field("supervised").type),
            pa.array(chunk.num_supervised),
            pa.array(np.full(count, chunk.source, np.int32)),
            pa.array(chunk.row),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._examples += count

    def finish(self, digest: str, statistics: Mapping[str, Any]) -> None:
        """Syncs the examples and writes the index, which makes the entry readable."""
        self._writer.close()
        _sync(self._file)
        size = self._file.tell()
        self._file.close()
        index = {
            "format_version": FORMAT_VERSION,
            "digest": digest,
            "examples": self._examples,
            "examples_bytes": size,
            "statistics": dict(statistics),
        }
        with (self._directory / INDEX_FILE).open("xb") as file:
            file.write(json.dumps(index, indent=1).encode())
            _sync(file)

    def close(self) -> None:
        """Lets go of the file; for an entry that is not finished."""
        self._file.close()


def open_or_build(
    root: Path,
    key: str,
    fill: Callable[[CacheWriter], Mapping[str, Any]],
    report: Callable[[str], None],
) -> TokenCache:
    """The entry `key` under `root`, built by `fill` (which returns its statistics) when absent or damaged.

    Of several processes that ask at once, on one host or on hosts that share `root`, one builds and the others wait.
    Raises `UserError` when the disk is full or cannot be written; no half-built entry is left behind.
    """
    path = root / key
    entry = _open(path, report)
    if entry is not None:
        return entry
    with writing_cache(root):
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f"{key}.lock", report):
            entry = _open(path, lambda _: None)
            if entry is None:
                _build(path, key, fill)
                entry = TokenCache.open(path)
    return entry


def _open(path: Path, report: Callable[[str], None]) -> TokenCache | None:
    if not path.is_dir():
        return None
    try:
        return TokenCache.open(path)
    except DamagedCacheError as error:
        report(f"{error} It is built again.")
        return None


def _build(path: Path, key: str, fill: Callable[[CacheWriter], Mapping[str, Any]]) -> None:
    for abandoned in path.parent.glob(f".{key[:16]}-*"):  # by a builder that was killed: we hold its lock now
        shutil.rmtree(abandoned, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=f".{key[:16]}-", dir=path.parent))
    try:
        writer = CacheWriter(building)
        try:
            writer.finish(key, fill(writer))
        finally:
            writer.close()
        if path.exists():  # a damaged entry: another process may still map its files, so it is moved, then removed
            path.rename(building / "damaged")
        building.rename(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(path / "damaged", ignore_errors=True)
    _sync_directory(path.parent)


@contextmanager
def _lock(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        report("Another process is preparing the same data; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
