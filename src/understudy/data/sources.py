"""From a recipe's data source to files and rows: a file, a directory, a glob, or a data set on the Hub."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from understudy.data.hub import HubRows, find_on_hub
from understudy.data.readers import COMPRESSIONS, KINDS, kind_of, read_rows
from understudy.data.row import Row
from understudy.errors import UserError
from understudy.recipe.schema import DataSource

__all__ = ["Rows", "SourceFiles", "find_source"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What `datasets` writes beside the data."""


class Rows(Protocol):
    """The rows of one source, readable again and again in the same order."""

    def identity(self, digest: Callable[[Path], str]) -> object:
        """What the rows are a function of, as JSON; `digest` gives a file's SHA-256."""
        ...

    def size(self) -> int | None:
        """What `consumed` adds up to when all is read; None when unknown."""
        ...

    def rows(self, consumed: Callable[[int], None]) -> Iterator[Row]:
        """Every row, numbered from 0. Raises `UserError` with file and line where the data is bad."""
        ...


@dataclass(frozen=True)
class SourceFiles:
    """Rows of files, in the order of their names."""

    files: tuple[tuple[Path, str], ...]
    """Each with its kind."""
    max_samples: int | None

    def identity(self, digest: Callable[[Path], str]) -> object:
        return [[kind, path.suffix.lower().lstrip("."), digest(path)] for path, kind in self.files]

    def size(self) -> int | None:
        return None if self.max_samples is not None else sum(path.stat().st_size for path, _ in self.files)

    def rows(self, consumed: Callable[[int], None]) -> Iterator[Row]:
        return itertools.islice(self._all_rows(consumed), self.max_samples)

    def _all_rows(self, consumed: Callable[[int], None]) -> Iterator[Row]:
        number = 0
        for path, kind in self.files:
            first = number
            for row in read_rows(path, kind, number, consumed):
                yield row
                number = row.number + 1
            if number == first:
                raise UserError("the file is empty: it holds no rows; fill it or name another.", file=path)


def find_source(source: DataSource, *, cache_dir: Path) -> Rows:
    """Where the rows of `source` are. Raises `UserError`, without a place, when they are nowhere to be found.

    Of a directory or glob whose file names tell splits apart (train.jsonl, data/test-00000.parquet), only the files of
    `source.split` are taken.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        found = _in_directory(path)
    elif path.exists():
        return SourceFiles(((path, _kind(path)),), source.max_samples)
    elif glob.has_magic(source.path):
        # Path.glob takes no absolute patterns.
        matches = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207
        found = sorted(match for match in matches if match.is_file())
        if not found:
            raise UserError(f"no file matches {source.path}; correct the pattern.")
    elif _HUB_ID.fullmatch(source.path) and kind_of(path) is None:
        return HubRows(find_on_hub(source.path), source.subset, source.split, source.max_samples, cache_dir)
    else:
        raise UserError(f"there is no file or directory {source.path}; correct the path.")
    files = tuple((file, _kind(file)) for file in _of_split(found, path, source))
    if len(kinds := sorted({kind for _, kind in files})) > 1:
        raise UserError(
            f"{source.path} holds files of several kinds ({', '.join(kinds)}); name one kind, as in "
            f"{path / ('*.' + kinds[0])}."
        )
    return SourceFiles(files, source.max_samples)


def _in_directory(path: Path) -> list[Path]:
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and kind_of(file) is not None
        and file.name not in _NO_DATA
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise UserError(f"the directory {path} holds no data files ({', '.join(KINDS)}); name another.")
    return found


def _of_split(files: list[Path], path: Path, source: DataSource) -> list[Path]:
    if not path.is_dir() or len(files) == 1:
        return files
    splits = {file: _split_of(str(file.relative_to(path))) for file in files}
    named = {split for split in splits.values() if split is not None}
    if not named:
        if source.split != "train":
            raise UserError(f"the names of the files in {path} tell no splits apart, so there is no {source.split!r}.")
        return files
    wanted = _split_of(source.split) or source.split
    if wanted not in named:
        raise UserError(f"{path} has the splits {', '.join(sorted(named))} but no {source.split!r}; set split.")
    if unnamed := [file for file, split in splits.items() if split is None]:
        raise UserError(
            f"{path} holds files of the splits {', '.join(sorted(named))} and others that name none "
            f"({unnamed[0].relative_to(path)}); name the files to read, one by one or by a pattern such as "
            f"{path / ('*' + unnamed[0].suffix)}."
        )
    return [file for file in files if splits[file] == wanted]


def _split_of(name: str) -> str | None:
    """The split that a file's name tells, as on the Hub: a keyword between separators."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, keywords in _SPLITS.items() if any(word in keywords for word in words)), None)


def _kind(path: Path) -> str:
    kind = kind_of(path)
    if kind is None:
        raise UserError(
            f"the name {path.name} tells no known kind of data; known are {', '.join(KINDS)}, "
            f"each also compressed ({', '.join(COMPRESSIONS)})."
        )
    return kind
