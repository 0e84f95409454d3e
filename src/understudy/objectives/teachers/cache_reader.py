"""Reads a teacher cache: finds examples by key, maps shards, checks each one's digest before it is first used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from understudy.errors import UserError
from understudy.objectives.teachers.cache_contents import Rows
from understudy.objectives.teachers.cache_format import (
    BUILD_COMMAND,
    INDEX,
    MARKER,
    CacheDescription,
    Positions,
    example_key,
    file_digest,
    place_of_key,
    read_description,
    shard_name,
    sortable,
)

__all__ = ["CommittedPart", "DamagedCacheError", "TeacherCache", "open_parts"]

MISSING = "is missing"

_LISTED = re.compile(r"([0-9a-f]{64})  (\S+)\n")


class DamagedCacheError(UserError):
    """A committed part of a teacher cache is not what was written; names the file."""


class TeacherCache:
    """What the teacher says of every example that was built. `open` reads the index; shards are mapped when first used.

    Reads only, so that the disk may be read-only and any number of processes share the pages. No collective.
    """

    def __init__(self, directory: Path, description: CacheDescription, parts: Sequence[CommittedPart]) -> None:
        self.directory = directory
        self.description = description
        self._parts = tuple(parts)

    @staticmethod
    def open(directory: Path, expected: CacheDescription | None = None) -> TeacherCache:
        """The cache in `directory`. Raises `UserError` when nothing is committed there, when it was changed, or when it
        is not the one `expected`, naming each field that differs with both values."""
        description = read_description(directory)
        if expected is not None:
            description.check_same(expected, directory)
        parts = list(open_parts(directory, description))
        if not parts:
            raise UserError(
                f"the teacher cache was never finished; {BUILD_COMMAND} goes on where it stopped.", file=directory
            )
        return TeacherCache(directory, description, parts)

    def __len__(self) -> int:
        """Examples held."""
        return sum(len(part.keys) for part in self._parts)

    def __contains__(self, key: bytes) -> bool:
        """Whether the example of this key is held; see `example_key`."""
        return any(part.find(key) is not None for part in self._parts)

    def targets(self, tokens: Positions, supervised: Positions) -> Rows:
        """What the teacher says at the N supervised positions of an example, in order, on the CPU.

        `tokens` [L] and `supervised` [L] as for `example_key`. Raises `UserError` when the example is not held, or its
        shard is damaged.
        """
        return self.batch_targets([(tokens, supervised)])

    def batch_targets(self, examples: Sequence[tuple[Positions, Positions]]) -> Rows:
        """As `targets`, of several examples end to end, such as a batch's documents: N is the sum of theirs. An example
        without a supervised position has no rows, held or not."""
        layout = self.description.contents.layout()
        # No rows, so that no examples at all have the right shapes too.
        found = [{name: torch.empty((0, *spec.shape), dtype=spec.dtype) for name, spec in layout.items()}]
        for tokens, supervised in examples:
            if supervised.any():  # nothing was asked of the teacher elsewhere, such as in an empty micro-batch
                found.append(self._stored(example_key(tokens, supervised)))
        return self.description.contents.decode({name: torch.cat([rows[name] for rows in found]) for name in layout})

    def verify(self) -> None:
        """Reads every byte. Raises `DamagedCacheError` naming the first shard that is not what was written."""
        for part in self._parts:
            part.verify()

    def _stored(self, key: bytes) -> dict[str, Tensor]:
        for part in self._parts:
            if (place := part.find(key)) is not None:
                return part.rows(*place)
        raise UserError(
            f"the teacher cache of {len(self):,} examples lacks one that is asked for (key {key.hex()}): the data, the "
            f"template or the length of examples changed; {BUILD_COMMAND} adds what is missing.",
            file=self.directory,
        )


class CommittedPart:
    """The examples that one build added. Raises `DamagedCacheError` unless marker and index agree and every shard is
    there; `identity` is the cache's."""

    def __init__(self, directory: Path, identity: str) -> None:
        self.directory = directory
        self._digests = _read_marker(directory / MARKER)
        index = directory / INDEX
        _check(index, self._digests.get(INDEX))
        with safe_open(index, framework="pt", device="cpu") as file:
            if file.metadata() != {"identity": identity}:
                raise _damaged(directory, "belongs to another teacher cache")
            self.keys: npt.NDArray[np.bytes_] = sortable(file.get_tensor("keys").numpy())
            """[E] ascending, see `sortable`."""
            self._shard: npt.NDArray[np.int32] = file.get_tensor("shard").numpy()
            self._row: npt.NDArray[np.int32] = file.get_tensor("row").numpy()
        self._num_shards = int(self._shard[-1]) + 1
        for shard in range(self._num_shards):
            if not (directory / shard_name(shard)).is_file():
                raise _damaged(directory / shard_name(shard), MISSING)
        self._shards: dict[int, dict[str, Tensor]] = {}

    def find(self, key: bytes) -> tuple[int, int] | None:
        """The shard that holds the example, and which of the shard's examples it is, from 0."""
        place = place_of_key(self.keys, key)
        return None if place is None else (int(self._shard[place]), int(self._row[place]))

    def rows(self, shard: int, row: int) -> dict[str, Tensor]:
        """The stored tensors' rows of one example, views of the mapped file."""
        tensors = self._opened(shard)
        start, end = tensors["offsets"][row : row + 2].tolist()
        return {name: tensor[start:end] for name, tensor in tensors.items() if name not in ("keys", "offsets")}

    def verify(self) -> None:
        """Reads every byte of every shard."""
        for shard in range(self._num_shards):
            self._check(shard)

    def _opened(self, shard: int) -> dict[str, Tensor]:
        if shard not in self._shards:
            self._check(shard)
            path = self.directory / shard_name(shard)
            # Its tensors are views of the mapped file, which they keep mapped; no file stays open.
            with safe_open(path, framework="pt", device="cpu") as file:
                self._shards[shard] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return self._shards[shard]

    def _check(self, shard: int) -> None:
        name = shard_name(shard)
        _check(self.directory / name, self._digests.get(name))


def open_parts(directory: Path, description: CacheDescription) -> Iterator[CommittedPart]:
    """The committed parts of the cache in `directory`, in order of name. Raises as `CommittedPart`."""
    for marker in sorted(directory.glob(f"part-*/{MARKER}")):
        yield CommittedPart(marker.parent, description.identity)


def _read_marker(path: Path) -> dict[str, str]:
    """File name: SHA-256."""
    try:
        text = path.read_text(encoding="ascii")
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise _damaged(path, "is not a commit marker") from None
    listed = {match[2]: match[1] for match in _LISTED.finditer(text)}
    if "".join(f"{digest}  {name}\n" for name, digest in listed.items()) != text:
        raise _damaged(path, "is not a commit marker")
    return listed


def _check(path: Path, expected: str | None) -> None:
    if expected is None:
        raise _damaged(path.with_name(MARKER), f"does not vouch for {path.name}")
    try:
        found = file_digest(path)
    except FileNotFoundError:
        raise _damaged(path, MISSING) from None
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None
    if found != expected:
        raise _damaged(path, "is not what was written: its SHA-256 differs")


def _damaged(path: Path, what: str) -> DamagedCacheError:
    remove = "" if what == MISSING else "remove it and "
    return DamagedCacheError(f"{what}; {remove}run {BUILD_COMMAND}, which builds again what is missing.", file=path)
