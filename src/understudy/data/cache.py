"""The token cache: tokenised examples in one memory-mapped Arrow file, immutable once built. Imports no torch.

An entry is a directory named by its key: `examples.arrow`, record batches in example order, and `cache.json`, counts
and statistics. `understudy.data.builder` writes entries, `understudy.data.identity` computes keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from understudy.errors import UnderstudyError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EXAMPLES_FILE", "FORMAT_VERSION", "INDEX_FILE", "SCHEMA", "DamagedCacheError", "TokenCache"]

FORMAT_VERSION = 1
"""Part of every key: raise it whenever the same input would give other tokens or another layout."""

EXAMPLES_FILE = "examples.arrow"
INDEX_FILE = "cache.json"

SCHEMA = pa.schema(
    [
        pa.field("tokens", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("supervised", pa.list_(pa.field("item", pa.uint8(), nullable=False)), nullable=False),
        pa.field("num_supervised", pa.int32(), nullable=False),
        pa.field("source", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
)


class DamagedCacheError(UnderstudyError):
    """An entry of the token cache is not what its builder wrote."""


@dataclass(frozen=True)
class TokenCache:
    """A prepared set of E examples. `open` maps the file; nothing is read until an example is asked for."""

    path: Path
    digest: str
    """The entry's key: equal digests hold equal examples."""
    statistics: Mapping[str, Any]
    """Counts taken while building, as `cache.json` holds them."""
    lengths: npt.NDArray[np.int32]
    """[E] tokens of each example."""
    num_supervised: npt.NDArray[np.int32]
    """[E] supervised tokens that have a predecessor in the example, as trained on."""
    source: npt.NDArray[np.int32]
    """[E] which of the recipe's sources each example comes from."""
    row: npt.NDArray[np.int64]
    """[E] row of that source, from 0."""
    _words: npt.NDArray[np.int32] = field(repr=False)
    """The whole file seen as int32; example i's tokens start at _token_starts[i]."""
    _bytes: npt.NDArray[np.uint8] = field(repr=False)
    """The whole file seen as bytes; example i's supervised flags start at _flag_starts[i]."""
    _token_starts: npt.NDArray[np.int64] = field(repr=False)
    _flag_starts: npt.NDArray[np.int64] = field(repr=False)

    @staticmethod
    def open(path: Path) -> TokenCache:
        """Maps the entry at `path`. Raises `DamagedCacheError` unless its files have the sizes its builder noted."""
        index = _read_index(path)
        try:
            mapped = pa.memory_map(str(path / EXAMPLES_FILE))
            whole = mapped.read_buffer()
            reader = pa.ipc.open_file(mapped)
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, pa.ArrowException) as error:
            raise DamagedCacheError(f"the token cache {path} cannot be read: {error}") from error
        contents = np.frombuffer(whole, dtype=np.uint8)
        token_starts = _concatenate([_starts(batch.column("tokens"), whole, 4) for batch in batches], np.int64)
        if len(token_starts) != index["examples"]:
            raise DamagedCacheError(
                f"the token cache {path} holds {len(token_starts)} examples, not {index['examples']}."
            )
        return TokenCache(
            path=path,
            digest=index["digest"],
            statistics=index["statistics"],
            lengths=_concatenate([np.diff(_offsets(batch.column("tokens"))) for batch in batches], np.int32),
            num_supervised=_concatenate([batch.column("num_supervised").to_numpy() for batch in batches], np.int32),
            source=_concatenate([batch.column("source").to_numpy() for batch in batches], np.int32),
            row=_concatenate([batch.column("row").to_numpy() for batch in batches], np.int64),
            _words=contents[: len(contents) // 4 * 4].view(np.int32),
            _bytes=contents,
            _token_starts=token_starts,
            _flag_starts=_concatenate([_starts(batch.column("supervised"), whole, 1) for batch in batches], np.int64),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, i: int) -> npt.NDArray[np.int32]:
        """[L] token ids of example `i`, a read-only view of the file."""
        start = self._token_starts[i]
        return self._words[start : start + self.lengths[i]]

    def supervised(self, i: int) -> npt.NDArray[np.uint8]:
        """[L] 1 where the token is supervised, a read-only view of the file."""
        start = self._flag_starts[i]
        return self._bytes[start : start + self.lengths[i]]

    def gather(self, examples: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Tokens [T] and supervised flags [T] of several examples end to end, copied."""
        if not len(examples):
            return np.zeros(0, np.int64), np.zeros(0, np.bool_)
        tokens = np.concatenate([self.tokens(i) for i in examples.tolist()], dtype=np.int64)
        flags = np.concatenate([self.supervised(i) for i in examples.tolist()])
        return tokens, flags.view(np.bool_)

    def document(self, i: int) -> tuple[Tensor, Tensor]:
        """Example `i` as `(tokens [L] int64, labels [L] int64)`, labels shifted and IGNORED where unsupervised."""
        import torch

        from understudy.contracts import IGNORED

        tokens = torch.from_numpy(self.tokens(i).astype(np.int64))
        labels = torch.full_like(tokens, IGNORED)
        predicted = torch.from_numpy(self.supervised(i)[1:].astype(np.bool_))
        labels[:-1] = torch.where(predicted, tokens[1:], labels[:-1])
        return tokens, labels


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads((path / INDEX_FILE).read_text(encoding="utf-8"))
        size = (path / EXAMPLES_FILE).stat().st_size
        sound = index["format_version"] == FORMAT_VERSION and index["examples_bytes"] == size
        required = (index["digest"], index["statistics"], index["examples"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCacheError(f"the token cache {path} is incomplete: {error}") from error
    if not sound or not isinstance(required[2], int):
        raise DamagedCacheError(f"the token cache {path} does not have the size that was written.")
    return dict(index)


def _offsets(column: pa.ListArray) -> npt.NDArray[np.int32]:
    """[rows+1] where each list starts in the column's values."""
    offsets: npt.NDArray[np.int32] = column.offsets.to_numpy()
    return offsets


def _starts(column: pa.ListArray, whole: pa.Buffer, width: int) -> npt.NDArray[np.int64]:
    """Where each list starts in the file, counted in elements of `width` bytes."""
    values = column.values.buffers()[1]
    base = 0 if values is None else values.address - whole.address
    if not 0 <= base <= whole.size or base % width:
        raise DamagedCacheError("the token cache is compressed or misaligned; it was not written by this program.")
    return base // width + _offsets(column)[:-1].astype(np.int64)


def _concatenate(parts: list[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
