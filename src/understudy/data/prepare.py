"""Prepares a recipe's data before any process group exists (P7): finds it, names it by its content, tokenises it once.

A second start with the same data finds the entry by its key and imports neither torch nor transformers for it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from understudy.data.builder import CacheWriter, open_or_build
from understudy.data.cache import TokenCache
from understudy.data.formats.registry import formats, recognise
from understudy.data.identity import FileDigests, cache_key, tokenizer_digest
from understudy.data.order import hash64
from understudy.data.progress import TokenisingProgress
from understudy.data.row import Row
from understudy.data.sources import Rows, find_source
from understudy.data.statistics import SetStatistics
from understudy.data.tokenisation import TokeniserSettings, rename
from understudy.data.tokenizer_settings import tokeniser_settings
from understudy.data.workers import RowChunk, tokenise_chunks
from understudy.errors import UserError
from understudy.recipe.schema import DataSource, Recipe
from understudy.recipe.source_map import SourceMap

__all__ = ["PreparedData", "prepare_data", "prepare_evaluation_data"]

_ROWS_PER_CHUNK = 256
_MOST_WORKERS = 32
"""Beyond, the one process that reads is the slowest."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class PreparedData:
    """Token caches, to be opened with `TokenCache.open` on every rank."""

    train: Path
    evaluation: Path | None
    digest: str
    """Equal for equal training examples."""
    train_statistics: Mapping[str, Any]
    evaluation_statistics: Mapping[str, Any] | None


@dataclass(frozen=True)
class _Share:
    """Which rows of the sources a set takes: all, or one side of `eval_fraction`."""

    side: Literal["all", "train", "evaluation"]
    fraction: float = 0.0
    seed: int = 0

    def of(self, rows: list[Row], source: int) -> list[Row]:
        """A pure function of the seed and each row's number, so that added rows leave the others on their side."""
        if self.side == "all":
            return rows
        draws = hash64(np.array([row.number for row in rows], np.int64), self.seed, 3, source)
        evaluated = draws < np.uint64(self.fraction * 2**64)
        return list(itertools.compress(rows, evaluated if self.side == "evaluation" else ~evaluated))


@dataclass(frozen=True)
class _Set:
    """One set of examples to prepare."""

    title: str
    key: str
    """Of the recipe, such as data.train."""
    sources: tuple[DataSource, ...]
    share: _Share


def prepare_data(
    recipe: Recipe,
    sources: SourceMap,
    *,
    tokenizer_dir: Path,
    vocab_size: int | None,
    cache_dir: Path,
    report: Report,
) -> PreparedData:
    """Training and evaluation examples of `recipe`, tokenised or found under `cache_dir`. Writes nowhere else.

    `vocab_size` is the model's, to refuse token ids that it has no embedding for. `report` takes lines for the user.
    Raises `UserError` with the file and line at fault, in the data or in the recipe. Called once, before processes.
    """
    preparation = _Preparation(recipe, sources, tokenizer_dir, vocab_size, cache_dir, report)
    data = recipe.data
    split = data.eval_fraction > 0
    share = _Share("train", data.eval_fraction, recipe.training.seed) if split else _Share("all")
    train = preparation.prepare(_Set("Training data", "data.train", data.train, share))
    held_out = _evaluation_set(recipe)
    evaluation = None if held_out is None else preparation.prepare(held_out)
    return PreparedData(
        train=train.path,
        evaluation=None if evaluation is None else evaluation.path,
        digest=train.digest,
        train_statistics=train.statistics,
        evaluation_statistics=None if evaluation is None else evaluation.statistics,
    )


def prepare_evaluation_data(
    recipe: Recipe,
    sources: SourceMap,
    *,
    tokenizer_dir: Path,
    vocab_size: int | None,
    cache_dir: Path,
    report: Report,
) -> TokenCache | None:
    """The evaluation examples alone, as `prepare_data` has them; None where the recipe has no evaluation data."""
    held_out = _evaluation_set(recipe)
    if held_out is None:
        return None
    return _Preparation(recipe, sources, tokenizer_dir, vocab_size, cache_dir, report).prepare(held_out)


def _evaluation_set(recipe: Recipe) -> _Set | None:
    data = recipe.data
    if data.eval_fraction > 0:
        share = _Share("evaluation", data.eval_fraction, recipe.training.seed)
        return _Set("Evaluation data", "data.train", data.train, share)
    return None if data.eval is None else _Set("Evaluation data", "data.eval", data.eval, _Share("all"))


@dataclass(frozen=True)
class _Preparation:
    recipe: Recipe
    source_map: SourceMap
    tokenizer_dir: Path
    vocab_size: int | None
    cache_dir: Path
    report: Report

    def prepare(self, wanted: _Set) -> TokenCache:
        found = [self._find(source, f"{wanted.key}.{number}") for number, source in enumerate(wanted.sources)]
        entry = open_or_build(
            self.cache_dir / "tokens",
            self._key(wanted, found),
            lambda writer: self._fill(writer, wanted, found),
            self.report,
        )
        self._check_vocabulary(entry.statistics["tokenizer_vocabulary"], entry.statistics["max_token_id"])
        self.report(f"{wanted.title}: {_summary(entry.statistics, self.recipe.data.max_length)}")
        return entry

    def _find(self, source: DataSource, key: str) -> Rows:
        unknown = [
            ours for ours in source.columns if source.format != "auto" and ours not in formats()[source.format].columns
        ]
        if unknown:
            known = ", ".join(formats()[source.format].columns)
            raise self.source_map.error(
                f"{key}.columns.{unknown[0]}",
                f"the format {source.format} has no field {unknown[0]!r}; it has {known}.",
            )
        try:
            return find_source(source, cache_dir=self.cache_dir)
        except UserError as error:
            raise error if error.file else self.source_map.error(f"{key}.path", error.message) from error

    def _key(self, wanted: _Set, found: list[Rows]) -> str:
        data, digest = self.recipe.data, FileDigests(self.cache_dir / "digests")
        template = data.chat_template
        if template is not None and "{" not in template and Path(template).expanduser().is_file():
            template = digest(Path(template).expanduser())
        try:
            return cache_key(
                {
                    "sources": [
                        [rows.identity(digest), source.format, dict(source.columns), source.max_samples]
                        for source, rows in zip(wanted.sources, found)
                    ],
                    "share": [wanted.share.side, wanted.share.fraction, wanted.share.seed],
                    "tokenizer": tokenizer_digest(self.tokenizer_dir, digest),
                    "chat_template": template,
                    "max_length": data.max_length,
                    "overflow": data.overflow,
                    "train_on_prompt": data.train_on_prompt,
                }
            )
        except PermissionError as error:
            raise UserError("the file cannot be read; correct its permissions.", file=error.filename) from error

    def _fill(self, writer: CacheWriter, wanted: _Set, found: list[Rows]) -> Mapping[str, Any]:
        settings = self._settings()
        vocabulary = settings.vocabulary
        self._check_vocabulary(vocabulary, -1)
        statistics = SetStatistics()
        sizes = [rows.size() for rows in found]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        with TokenisingProgress(wanted.title, total, self.report) as progress:
            chunks = self._chunks(wanted, found, statistics, progress.read)
            for tokenised in tokenise_chunks(chunks, settings, self._workers()):
                statistics.add(tokenised)
                self._check_vocabulary(vocabulary, statistics.max_token_id)
                writer.append(tokenised.chunk)
                progress.tokenised(tokenised.counts["rows"], len(tokenised.chunk.tokens))
        if not statistics["examples"]:
            raise self._refusal(wanted, statistics)
        return {**statistics.as_json(), "tokenizer_vocabulary": vocabulary}

    def _settings(self) -> TokeniserSettings:
        try:
            return tokeniser_settings(self.recipe, self.tokenizer_dir)
        except UserError as error:
            key = self._tokenizer_key() if self.recipe.data.chat_template is None else "data.chat_template"
            raise error if error.file else self.source_map.error(key, error.message) from error

    def _tokenizer_key(self) -> str:
        return "model.tokenizer" if self.recipe.model.tokenizer else "model.path"

    def _chunks(
        self, wanted: _Set, found: list[Rows], statistics: SetStatistics, consumed: Callable[[int], None]
    ) -> Iterator[RowChunk]:
        for number, (source, available) in enumerate(zip(wanted.sources, found)):
            rows = available.rows(consumed)
            first = next(rows, None)
            if first is None:
                raise self.source_map.error(f"{wanted.key}.{number}.path", f"{source.path} holds no rows.")
            format_name = self._format(source, first)
            statistics.begin_source(number, source.path, format_name)
            rows = itertools.chain([first], rows)
            while chunk := list(itertools.islice(rows, _ROWS_PER_CHUNK)):
                if taken := wanted.share.of(chunk, number):
                    yield RowChunk(taken, format_name, source.columns, number)

    def _format(self, source: DataSource, first: Row) -> str:
        if source.format != "auto":
            return source.format
        columns = first.columns()
        try:
            name = recognise(rename(columns, source.columns)).name
        except UserError as error:
            raise first.error(error.message) from error
        self.report(f"{source.path}: recognised the format {name} from the columns {', '.join(columns)}.")
        return name

    def _workers(self) -> int:
        wanted = self.recipe.data.num_workers
        return min(len(os.sched_getaffinity(0)), _MOST_WORKERS) if wanted == "auto" else wanted

    def _check_vocabulary(self, tokenizer_vocabulary: int, max_token_id: int) -> None:
        """A tokenizer may have added tokens that the model has no embedding for, as long as none is in the data."""
        needed = max(tokenizer_vocabulary, max_token_id + 1)
        if self.vocab_size is not None and needed > self.vocab_size:
            raise self.source_map.error(
                self._tokenizer_key(),
                f"the model's vocabulary of {self.vocab_size:,} is smaller than the tokenizer's {needed:,} tokens; use "
                "the tokenizer that the model was made with, or a larger vocab_size in model.config.",
            )

    def _refusal(self, wanted: _Set, statistics: SetStatistics) -> UserError:
        """Why a set came out empty."""
        data = self.recipe.data
        if not statistics["rows"]:
            return self.source_map.error(
                "data.eval_fraction",
                f"eval_fraction {data.eval_fraction} leaves no example for the {wanted.title.lower()}; there are too "
                "few rows for it, so change it or give data.eval.",
            )
        if statistics["dropped_long"]:
            return self.source_map.error(
                "data.max_length",
                f"every example is longer than max_length {data.max_length}, and overflow: drop leaves none; raise it.",
            )
        if statistics["cut_to_prompt"]:
            return self.source_map.error(
                "data.max_length",
                f"max_length {data.max_length} is shorter than every prompt, so nothing is left to train on; raise it.",
            )
        return self.source_map.error(
            wanted.key,
            "no token of this data is supervised: no row has an answer of the assistant; check format, columns and the "
            "roles of the messages, or set data.train_on_prompt.",
        )


def _summary(statistics: Mapping[str, Any], max_length: int) -> str:
    tokens = max(statistics["tokens"], 1)
    parts = [
        f"{statistics['examples']:,} examples, {statistics['tokens']:,} tokens, "
        f"{statistics['supervised_tokens'] / tokens:.0%} supervised"
    ]
    longer = statistics["truncated"] + statistics["split"] + statistics["dropped_long"]
    if longer:
        done = "truncated" if statistics["truncated"] else "split" if statistics["split"] else "dropped"
        parts.append(f"{longer:,} longer than {max_length} tokens {done}")
    unsupervised = statistics["dropped_unsupervised"] + statistics["cut_to_prompt"]
    if unsupervised:
        parts.append(f"{unsupervised:,} dropped that have nothing to supervise")
    return "; ".join(parts) + "."
