"""Builds a teacher cache: the examples that it lacks become one part, shard by shard, by any number of processes."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from understudy.errors import UserError
from understudy.objectives.teachers.cache_contents import Rows
from understudy.objectives.teachers.cache_format import (
    BUILD_COMMAND,
    DESCRIPTION,
    INDEX,
    MARKER,
    CacheDescription,
    ExampleKeys,
    file_digest,
    note_name,
    read_description,
    shard_name,
    sortable,
)
from understudy.objectives.teachers.cache_reader import CommittedPart, DamagedCacheError
from understudy.recipe.cache_disk import writing_cache

__all__ = ["BuiltSize", "CacheWriter", "building"]


class BuiltSize(NamedTuple):
    """What one build added."""

    examples: int
    tokens: int
    """Supervised ones, each a row."""
    num_bytes: int
    """Of shards and index."""

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / max(1, self.tokens)


class _Note(NamedTuple):
    """What `shard-….json` says of its shard."""

    num_bytes: int
    sha256: str


@contextmanager
def building(directory: Path, report: Callable[[str], None]) -> Iterator[None]:
    """One process of a build holds this while the build lasts; another build of the same cache waits for it, on this
    host or on one that shares the disk. Makes the directory above."""
    with writing_cache(directory.parent):
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{directory}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            report("Another process is building the same teacher cache; waiting for it.")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


class CacheWriter:
    """One process's share of a build. Shard i is written by rank i % world_size.

    What is built depends on the description and the examples that are missing, not on their order, on the number of
    processes or on how often the build was killed: another run with the same examples goes on with the shards that are
    not there yet, and ends in the same bytes. Every rank makes its own, inside one process's `building`; all ranks have
    written before one of them commits. No collective in here.

    Raises `UserError` when the disk is full or `directory` holds another cache.
    """

    def __init__(
        self, directory: Path, description: CacheDescription, rank: int, world_size: int, examples: ExampleKeys
    ) -> None:
        self._directory = directory
        self._description = description
        self._rank, self._world_size = rank, world_size
        with writing_cache(directory):
            directory.mkdir(parents=True, exist_ok=True)
            if (directory / DESCRIPTION).exists():
                read_description(directory).check_same(description, directory)
            else:
                _write_durably(directory / DESCRIPTION, description.to_json())
                _sync_directory(directory.parent)
            keys = sortable(examples.keys)
            # Sorted by key, equal ones once.
            order = np.unique(keys, return_index=True)[1]
            for part in _sound_parts(directory, description):
                order = order[~np.isin(keys[order], part.keys)]
            self._order: npt.NDArray[np.int64] = order.astype(np.int64)
            self._keys = np.ascontiguousarray(examples.keys[order])
            self._num_supervised = examples.num_supervised[order]
            self._part = directory / f"part-{hashlib.sha256(self._keys.tobytes()).hexdigest()[:16]}"
            if self.num_shards:
                self._part.mkdir(exist_ok=True)
                _sync_directory(directory)

    @property
    def num_shards(self) -> int:
        """Shards of this build, of all ranks, written or not; 0 when nothing is missing."""
        return -(-len(self._order) // self._description.examples_per_shard)

    def pending(self) -> Iterator[int]:
        """This rank's shards that are not there yet. Those that are there are read to the last byte."""
        for shard in range(self._rank, self.num_shards, self._world_size):
            note = self._note(shard)
            if note is None or note.sha256 != file_digest(self._part / shard_name(shard)):
                yield shard

    def examples(self, shard: int) -> npt.NDArray[np.int64]:
        """Which of the constructor's examples the shard holds, in the order in which `write` wants them."""
        return self._order[self._run(shard)]

    def write(self, shard: int, rows: Rows) -> None:
        """Writes a shard and waits until the disk has it. `rows`: those of its examples end to end, on the CPU; N
        is the sum of their supervised positions."""
        run = self._run(shard)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._num_supervised[run])])
        stored = self._description.contents.encode(rows)
        for name, spec in self._description.contents.layout().items():
            found = (tuple(stored[name].shape), stored[name].dtype)
            if found != ((int(offsets[-1]), *spec.shape), spec.dtype):
                raise ValueError(f"{name} {found} for shard {shard} of {offsets[-1]} rows {spec}")
        content = self._saved(
            {"keys": torch.from_numpy(self._keys[run]), "offsets": torch.from_numpy(offsets), **stored}
        )
        note = _Note(len(content), hashlib.sha256(content).hexdigest())
        with writing_cache(self._part):
            _write_durably(self._part / shard_name(shard), content)
            text = json.dumps({"bytes": note.num_bytes, "sha256": note.sha256})
            _write_durably(self._part / note_name(shard), text.encode())
            _sync_directory(self._part)

    def commit(self) -> BuiltSize:
        """Makes what was built count; one process, once all ranks have written. Raises `UserError` naming a shard that
        is not there."""
        if not self.num_shards:
            return BuiltSize(0, 0, 0)
        noted = {shard_name(shard): self._note(shard) for shard in range(self.num_shards)}
        notes = {name: note for name, note in noted.items() if note is not None}
        for name in sorted(noted.keys() - notes.keys()):
            raise UserError(
                f"was not written: a process of the build was lost; {BUILD_COMMAND} goes on where it stopped.",
                file=self._part / name,
            )
        with writing_cache(self._part):
            index = self._index()
            _write_durably(self._part / INDEX, index)
            # Left by a build that was killed.
            for abandoned in (*self._part.glob("*.partial"), *self._directory.glob("*.partial")):
                abandoned.unlink(missing_ok=True)
            _sync_directory(self._part)
            digests = {INDEX: hashlib.sha256(index).hexdigest(), **{name: note.sha256 for name, note in notes.items()}}
            marker = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
            _write_durably(self._part / MARKER, marker.encode())
            _sync_directory(self._part)
        num_bytes = len(index) + sum(note.num_bytes for note in notes.values())
        return BuiltSize(len(self._order), int(self._num_supervised.sum()), num_bytes)

    def _run(self, shard: int) -> slice:
        step = self._description.examples_per_shard
        return slice(shard * step, (shard + 1) * step)

    def _index(self) -> bytes:
        places = np.arange(len(self._order), dtype=np.int32)
        step = self._description.examples_per_shard
        return self._saved(
            {
                "keys": torch.from_numpy(self._keys),
                "shard": torch.from_numpy(places // step),
                "row": torch.from_numpy(places % step),
            }
        )

    def _saved(self, tensors: dict[str, Tensor]) -> bytes:
        content: bytes = save(tensors, metadata={"identity": self._description.identity})
        return content

    def _note(self, shard: int) -> _Note | None:
        """None unless note and shard are there and agree on the size."""
        try:
            stored = json.loads((self._part / note_name(shard)).read_bytes())
            note = _Note(stored["bytes"], stored["sha256"])
            size = (self._part / shard_name(shard)).stat().st_size
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return note if size == note.num_bytes else None


def _sound_parts(directory: Path, description: CacheDescription) -> Iterator[CommittedPart]:
    """Committed parts. One that lacks a file becomes a build that was not finished, and counts again once it is."""
    for marker in sorted(directory.glob(f"part-*/{MARKER}")):
        try:
            yield CommittedPart(marker.parent, description.identity)
        except DamagedCacheError:
            marker.unlink(missing_ok=True)


def _write_durably(path: Path, content: bytes) -> None:
    """`path` appears whole, once the disk has its content. Its directory entry lasts once the directory is synced."""
    # A process that outlived its build may still write: it must not write into our file.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
