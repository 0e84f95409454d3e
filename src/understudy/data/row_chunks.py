"""The rows that a set of examples takes from its sources, in order, some at a time, with how to read them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from understudy.data.column_names import check_columns, rename
from understudy.data.example_set import ExampleSet
from understudy.data.formats.registry import recognise
from understudy.data.row import Row
from understudy.errors import UserError
from understudy.recipe.schema import DataSource
from understudy.recipe.source_map import SourceMap

__all__ = ["RowChunk", "row_chunks"]

_ROWS_PER_CHUNK = 256


@dataclass(frozen=True)
class RowChunk:
    """Rows of one source, and how they are read."""

    rows: Sequence[Row]
    format_name: str
    columns: Mapping[str, str]
    source: int


def row_chunks(
    wanted: ExampleSet,
    source_map: SourceMap,
    report: Callable[[str], None],
    *,
    begin_source: Callable[[int, str], None],
    consumed: Callable[[int], None] = lambda count: None,
) -> Iterator[RowChunk]:
    """The set's rows; its sources were found. `begin_source` is told each source's number and format, `consumed` of
    what was read, as `Rows.size` counts it.

    Raises `UserError` at the file and line of bad data, or at the recipe's line of a source without rows.
    """
    for number, (source, available) in enumerate(zip(wanted.sources, wanted.found)):
        rows = available.rows(consumed)
        first = next(rows, None)
        if first is None:
            raise source_map.error(f"{wanted.key}.{number}.path", f"{source.path} holds no rows.")
        format_name = _format(source, first, f"{wanted.key}.{number}", source_map, report)
        begin_source(number, format_name)
        rows = itertools.chain([first], rows)
        while chunk := list(itertools.islice(rows, _ROWS_PER_CHUNK)):
            if taken := wanted.share.of(chunk, number):
                yield RowChunk(taken, format_name, source.columns, number)


def _format(source: DataSource, first: Row, key: str, source_map: SourceMap, report: Callable[[str], None]) -> str:
    if source.format != "auto":
        return source.format
    columns = first.columns()
    try:
        known = recognise(rename(columns, source.columns))
    except UserError as error:
        raise first.error(error.message) from error
    check_columns(known, source.columns, key, source_map)
    report(f"{source.path}: recognised the format {known.name} from the columns {', '.join(columns)}.")
    return known.name
