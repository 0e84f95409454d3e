"""A teacher cache's names: of the cache (what the teacher is asked), of an example (its tokens and mask), of files.

    <identity>/                        `CacheDescription.directory`
      cache.json                       the description, in words
      part-<digest of its keys>/       the examples that one build added; immutable once committed
        shard-00000.safetensors        a run of examples in order of key: keys, offsets, rows
        shard-00000.json               its size and SHA-256, from which a killed build goes on
        index.safetensors              every key in order, its shard and its place there
        COMMITTED                      the SHA-256 of index and shards, as sha256sum writes them; written last

docs/teacher-cache.md describes every field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from understudy.errors import UserError
from understudy.objectives.teachers.cache_contents import CONTENTS, Contents

__all__ = [
    "BUILD_COMMAND",
    "DESCRIPTION",
    "FORMAT_VERSION",
    "INDEX",
    "KEY_BYTES",
    "MARKER",
    "CacheDescription",
    "ExampleKeys",
    "example_key",
    "example_keys",
    "file_digest",
    "note_name",
    "place_of_key",
    "read_description",
    "shard_name",
    "sortable",
]

FORMAT_VERSION = 1
"""Part of every identity: raise it whenever the same targets would be stored otherwise."""

DESCRIPTION = "cache.json"
INDEX = "index.safetensors"
MARKER = "COMMITTED"
BUILD_COMMAND = "`understudy teacher cache RECIPE`"

KEY_BYTES = 16
READ_BYTES = 2**22

SHARD_BYTES = 2**24
"""About what a shard holds: what a killed build loses, and what a process holds in memory while it builds."""
TYPICAL_TOKENS = 256
"""Supervised tokens of an example, for that estimate alone."""
EXAMPLES_PER_SHARD = (8, 256)

Positions = Tensor | npt.NDArray[Any]


@dataclass(frozen=True)
class CacheDescription:
    """What decides what a cache holds for an example."""

    teacher: str
    """Names the teacher's weights, adapter and precision, by content."""
    tokenizer: str
    """Names the tokenizer and the chat template, by content."""
    contents: Contents

    def describe(self) -> dict[str, str | int | float]:
        """Every field that is part of the identity, flat, as `cache.json` holds them."""
        fields = {"format_version": FORMAT_VERSION, "teacher": self.teacher, "tokenizer": self.tokenizer}
        return {**fields, "kind": self.contents.kind, **asdict(self.contents)}

    @property
    def identity(self) -> str:
        """SHA-256 of the fields, hexadecimal."""
        text = json.dumps(self.describe(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def directory(self, root: Path) -> Path:
        """Where the cache lies under `root`."""
        return root / "teachers" / self.identity[:32]

    @property
    def bytes_per_token(self) -> int:
        """What a supervised token takes on the disk, without keys and offsets, which are counted by example."""
        return sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in self.contents.layout().values())

    @property
    def examples_per_shard(self) -> int:
        """A power of two, the same whoever builds."""
        fitting = SHARD_BYTES // (self.bytes_per_token * TYPICAL_TOKENS)
        fewest, most = EXAMPLES_PER_SHARD
        return min(most, max(fewest, 1 << max(0, fitting.bit_length() - 1)))

    def to_json(self) -> bytes:
        return json.dumps({"identity": self.identity, **self.describe()}, indent=1).encode()

    def check_same(self, expected: CacheDescription, file: Path) -> None:
        """Raises `UserError` that says what this cache, described in `file`, holds otherwise than `expected`."""
        ours, theirs = self.describe(), expected.describe()
        differing = [
            f"{name} {ours[name]} instead of {value}"
            for name, value in theirs.items()
            if name in ours and ours[name] != value  # another kind has other fields
        ]
        if differing:
            raise UserError(
                f"this teacher cache was built with {', '.join(differing)}; name the cache of this teacher and these "
                f"settings, or build it with {BUILD_COMMAND}.",
                file=file,
            )


class ExampleKeys(NamedTuple):
    """The examples that a cache is built for, E of them in any order; equal ones count once."""

    keys: npt.NDArray[np.uint8]
    """[E, 16]"""
    num_supervised: npt.NDArray[np.int64]
    """[E] supervised positions of each, so many rows are stored."""


def example_key(tokens: Positions, supervised: Positions) -> bytes:
    """The name of an example: 16 bytes of a SHA-256 over its `tokens` [L] and the mask [L] of its supervised positions.

    Position t is supervised when what is predicted *at* t is trained on: where `Batch.labels` [L] is not IGNORED. Both
    on the CPU; integers of any width, mask of bool or of 0 and 1.
    """
    ids = np.asarray(tokens).astype("<u4")
    mask = np.asarray(supervised).astype(np.bool_)
    if ids.ndim != 1 or ids.shape != mask.shape:
        raise ValueError(f"tokens {list(ids.shape)} and mask {list(mask.shape)} of one example")
    digest = hashlib.sha256(len(ids).to_bytes(8, "little"))
    digest.update(ids.tobytes())
    digest.update(mask.tobytes())
    return digest.digest()[:KEY_BYTES]


def example_keys(examples: Iterable[tuple[Positions, Positions]]) -> ExampleKeys:
    """Of examples `(tokens [L], supervised mask [L])`, as for `example_key`."""
    keys, counts = bytearray(), []
    for tokens, supervised in examples:
        keys += example_key(tokens, supervised)
        counts.append(int(np.count_nonzero(np.asarray(supervised))))
    return ExampleKeys(np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES), np.array(counts, np.int64))


def sortable(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.bytes_]:
    """Keys [E, 16] as [E] strings of sixteen bytes, which numpy compares as the bytes they are."""
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").reshape(-1)


def place_of_key(keys: npt.NDArray[np.bytes_], key: bytes) -> int | None:
    """Where `key` is among ascending `keys` as `sortable` gives them; None where it is not."""
    wanted = np.frombuffer(key, f"S{KEY_BYTES}")[0]
    place = int(np.searchsorted(keys, wanted))
    return place if place < len(keys) and keys[place] == wanted else None


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def note_name(shard: int) -> str:
    return f"shard-{shard:05d}.json"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest, buffer = hashlib.sha256(), bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def read_description(directory: Path) -> CacheDescription:
    """What the cache in `directory` says of itself. Raises `UserError` when there is none or it was changed."""
    file = directory / DESCRIPTION
    try:
        stored = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no teacher cache; build it with {BUILD_COMMAND}.", file=directory) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}); check its permissions.", file=file) from None
    except ValueError:
        raise _changed(file) from None
    if not isinstance(stored, dict):
        raise _changed(file)
    if (version := stored.get("format_version")) != FORMAT_VERSION:
        raise UserError(
            f"this teacher cache has format {version}, and this release reads {FORMAT_VERSION}; build it anew "
            f"with {BUILD_COMMAND}.",
            file=file,
        )
    description = _described(stored)
    if description is None or {"identity": description.identity, **description.describe()} != stored:
        raise _changed(file)
    return description


def _described(stored: Mapping[str, Any]) -> CacheDescription | None:
    named = ("identity", "format_version", "teacher", "tokenizer", "kind")
    try:
        contents = CONTENTS[stored["kind"]](**{name: value for name, value in stored.items() if name not in named})
        return CacheDescription(stored["teacher"], stored["tokenizer"], contents)
    except (KeyError, TypeError, ValueError):
        return None


def _changed(file: Path) -> UserError:
    return UserError(
        f"is not the description that was written; remove this directory and build it with {BUILD_COMMAND}.", file=file
    )
