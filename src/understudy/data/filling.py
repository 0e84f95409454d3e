"""Fills an entry of the token cache: reads the rows of a set, tokenises them in workers, writes them in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.data.builder import CacheWriter
from understudy.data.example_set import ExampleSet
from understudy.data.progress import TokenisingProgress
from understudy.data.row_chunks import row_chunks
from understudy.data.statistics import SetStatistics
from understudy.data.tokenisation import TokeniserSettings
from understudy.data.tokenizer_settings import tokeniser_settings
from understudy.data.vocabulary import check_vocabulary, tokenizer_key
from understudy.data.workers import tokenise_chunks
from understudy.errors import UserError
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap

__all__ = ["Filling"]

_MOST_WORKERS = 32
"""Beyond, the one process that reads is the slowest."""


@dataclass(frozen=True)
class Filling:
    """What filling needs besides the set; `vocab_size` is the model's, None when not known."""

    recipe: Recipe
    source_map: SourceMap
    tokenizer_dir: Path
    vocab_size: int | None
    report: Callable[[str], None]

    def fill(self, writer: CacheWriter, wanted: ExampleSet) -> Mapping[str, Any]:
        """Writes the set's examples and returns its statistics.

        Raises `UserError` at the file and line of bad data, or at the recipe's line where nothing is left to train on.
        """
        settings = self._settings()
        statistics = SetStatistics()
        sizes = [rows.size() for rows in wanted.found]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        with TokenisingProgress(wanted.title, total, self.report) as progress:
            chunks = row_chunks(
                wanted, self.source_map, self.report, begin_source=statistics.begin_source, consumed=progress.read
            )
            for tokenised in tokenise_chunks(chunks, settings, self._workers()):
                statistics.add(tokenised)
                self._check_vocabulary(settings, statistics.max_token_id)
                writer.append(tokenised.chunk)
                progress.tokenised(tokenised.counts["rows"], len(tokenised.chunk.tokens))
        if not statistics["examples"]:
            raise self._refusal(wanted, statistics)
        return {**statistics.as_json(), "tokenizer_vocabulary": settings.vocabulary}

    def _settings(self) -> TokeniserSettings:
        key = tokenizer_key(self.recipe) if self.recipe.data.chat_template is None else "data.chat_template"
        with self.source_map.placing(key):
            settings = tokeniser_settings(self.recipe, self.tokenizer_dir)
        self._check_vocabulary(settings, -1)
        return settings

    def _check_vocabulary(self, settings: TokeniserSettings, max_token_id: int) -> None:
        check_vocabulary(
            self.recipe,
            self.source_map,
            vocab_size=self.vocab_size,
            tokenizer=settings.vocabulary,
            max_token_id=max_token_id,
        )

    def _workers(self) -> int:
        wanted = self.recipe.data.num_workers
        if wanted != "auto":
            return wanted
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, _MOST_WORKERS)

    def _refusal(self, wanted: ExampleSet, statistics: SetStatistics) -> UserError:
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
