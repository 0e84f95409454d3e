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
        if kind in ("parquet", "arrow"):
            yield from _columnar(path, kind, first, consumed)
            return
        with _open(path, consumed) as file:
            if kind == "json":
                yield from read_json(name, file.read(), first)
            elif kind in ("jsonl", "ndjson"):
                yield from _json_lines(name, file, first)
            elif kind == "txt":
                yield from _text(name, file, first)
            else:
                yield from _csv(name, file, first, "\t" if kind == "tsv" else ",")
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"the compressed file is damaged or cut off ({error}).", file=name) from error
    except pa.ArrowException as error:
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the file cannot be read as {kind} ({words}).", file=name) from error
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror or error}).", file=name) from error


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


def _columnar(path: Path, kind: str, first: int, consumed: Callable[[int], None]) -> Iterator[Row]:
    size = path.stat().st_size
    batches = _parquet(path) if kind == "parquet" else _arrow(path)
    for batch in batches:
        for values in batch.to_pylist():
            yield Row(str(path), None, first, values)
            first += 1
    consumed(size)


def _parquet(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_ROWS_AT_ONCE)


def _arrow(path: Path) -> Iterator[pa.RecordBatch]:
    """Both layouts: the file format, and the stream that `datasets` saves."""
    with pa.memory_map(str(path)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        if is_file:
            reader = pa.ipc.open_file(mapped)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(mapped)
