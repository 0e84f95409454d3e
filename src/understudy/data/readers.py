"""Reads the rows of one file, with the line of each where the format has lines. Errors name file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import zstandard

from understudy.data.json_file import read_json
from understudy.data.row import BYTE_ORDER_MARK, Row, decode
from understudy.errors import UserError

__all__ = ["COMPRESSIONS", "KINDS", "kind_of", "read_rows"]

KINDS = ("json", "jsonl", "ndjson", "parquet", "csv", "tsv", "arrow", "txt")
COMPRESSIONS = ("gz", "zst", "bz2", "xz")
_ROWS_AT_ONCE = 1000


def kind_of(path: Path) -> str | None:
    """The file's kind by its name, compression aside; None when no kind is known."""
    suffixes = [suffix[1:].lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def read_rows(path: Path, kind: str, first: int, consumed: Callable[[int], None]) -> Iterator[Row]:
    """The rows of the file at `path`, numbered from `first`. `consumed` is told of bytes read, as they lie on disk.

    Raises `UserError` with file and line where the file cannot be read, is cut off, or is not UTF-8.
    """
    name = str(path)
    try:
        if kind in ("json", "parquet", "arrow"):
            yield from _by_share(_whole(path, kind, first), path.stat().st_size, consumed)
            return
        with _open(path, consumed) as file:
            if kind in ("jsonl", "ndjson"):
                yield from _json_lines(name, file, first)
            elif kind == "txt":
                yield from _text(name, file, first)
            else:
                yield from _csv(name, file, first, "\t" if kind == "tsv" else ",")
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"the compressed file is damaged or cut off ({error}); fetch it again.", file=name) from error
    except pa.ArrowException as error:
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the file cannot be read as {kind} ({words}); fetch it again.", file=name) from error
    except OSError as error:
        words = " ".join((error.strerror or str(error)).split())
        raise UserError(f"the file cannot be read ({words}); fetch it again or name another.", file=name) from error


class _Counted(io.FileIO):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, consumed: Callable[[int], None]) -> None:
        super().__init__(path)
        self._consumed = consumed

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer) or 0
        self._consumed(count)
        return count


def _open(path: Path, consumed: Callable[[int], None]) -> IO[bytes]:
    raw = io.BufferedReader(_Counted(path, consumed), 1 << 18)
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, reader), 1 << 18))
    return raw


def _lines(name: str, file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines from 1, without a byte order mark at the start of the file."""
    for line, content in enumerate(file, 1):
        yield line, content.removeprefix(BYTE_ORDER_MARK) if line == 1 else content


def _json_lines(name: str, file: Iterable[bytes], first: int) -> Iterator[Row]:
    for line, content in _lines(name, file):
        if content.strip():
            yield Row(name, line, first, content)
            first += 1


def _text(name: str, file: Iterable[bytes], first: int) -> Iterator[Row]:
    for line, content in _lines(name, file):
        text = decode(content, name, line).rstrip("\r\n")
        if text.strip():
            yield Row(name, line, first, {"text": text})
            first += 1


def _csv(name: str, file: Iterable[bytes], first: int, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the module's default refuses fields above 128 KiB
    reader = csv.reader((decode(content, name, line) for line, content in _lines(name, file)), delimiter=delimiter)
    try:
        header = next(reader, None)
        if header is None:
            return
        line = reader.line_num + 1
        for cells in reader:
            row = Row(name, line, first, dict(zip(header, cells)))
            line = reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                raise row.error(f"the row has {len(cells)} cells, but the header names {len(header)} columns.")
            yield row
            first += 1
    except csv.Error as error:
        raise UserError(f"the line is not valid CSV ({error}).", file=name, line=reader.line_num) from error


def _by_share(rows: Iterable[tuple[Row, float]], size: int, consumed: Callable[[int], None]) -> Iterator[Row]:
    """The rows alone; tells how much of the file's `size` bytes they were, from the shares they come with."""
    told = 0
    for row, share in rows:
        yield row
        if (reached := int(share * size)) - told >= size // 1000:
            consumed(reached - told)
            told = reached
    consumed(size - told)


def _whole(path: Path, kind: str, first: int) -> Iterator[tuple[Row, float]]:
    """Rows of the kinds that cannot be read as a stream, each with the share of the file read once it is."""
    if kind == "json":
        with _open(path, lambda count: None) as file:
            yield from read_json(str(path), file.read(), first)
        return
    if path.suffix.lower()[1:] in COMPRESSIONS:
        with _open(path, lambda count: None) as file:
            source = pa.BufferReader(file.read())
    else:
        source = pa.memory_map(str(path))
    with source:
        for batch, share in _parquet(source) if kind == "parquet" else _arrow(source):
            for columns in batch.to_pylist():
                yield Row(str(path), None, first, columns), share
                first += 1


def _parquet(source: pa.NativeFile) -> Iterator[tuple[pa.RecordBatch, float]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as file:
        done = 0
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            done += batch.num_rows
            yield batch, done / file.metadata.num_rows


def _arrow(source: pa.NativeFile) -> Iterator[tuple[pa.RecordBatch, float]]:
    """Both layouts: the file format, and the stream that `datasets` saves."""
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if is_file:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number), (number + 1) / reader.num_record_batches
    else:
        for batch in pa.ipc.open_stream(source):
            yield batch, source.tell() / source.size()
