"""Prepares a recipe's data before any process group exists (P7): finds it, names it by its content, tokenises it once.

A second start with the same data finds the entry by its key and imports neither torch nor transformers for it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from understudy.data.builder import CacheWriter, open_or_build
from understudy.data.cache import TokenCache
from understudy.data.column_names import check_columns
from understudy.data.example_set import ExampleSet, evaluation_set, training_set
from understudy.data.formats.registry import formats
from understudy.data.identity import FileDigests, cache_key, tokenizer_digest
from understudy.data.sources import Rows, SourceFiles, find_source
from understudy.data.vocabulary import check_vocabulary
from understudy.errors import UnderstudyError, UserError
from understudy.recipe.schema import DataSource, Recipe
from understudy.recipe.source_map import SourceMap
from understudy.recipe.text_file import file_named

__all__ = ["PreparedData", "find_sources", "found_set", "prepare_data", "prepare_evaluation_data"]

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


def find_sources(recipe: Recipe, source_map: SourceMap, cache_dir: Path) -> None:
    """Raises `UserError` at the recipe's line of a source that is nowhere to be found. Imports no torch."""
    for wanted in filter(None, (training_set(recipe), evaluation_set(recipe))):
        found_set(wanted, source_map, cache_dir)


def found_set(wanted: ExampleSet, source_map: SourceMap, cache_dir: Path) -> ExampleSet:
    """`wanted` with its sources' rows. Raises as `find_sources`."""
    found = [
        _find(source, f"{wanted.key}.{number}", source_map, cache_dir) for number, source in enumerate(wanted.sources)
    ]
    return replace(wanted, found=found)


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
    _refuse_inside_an_import()
    preparation = _Preparation(recipe, sources, tokenizer_dir, vocab_size, cache_dir, report)
    train = preparation.prepare(training_set(recipe))
    held_out = evaluation_set(recipe)
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
    held_out = evaluation_set(recipe)
    if held_out is None:
        return None
    return _Preparation(recipe, sources, tokenizer_dir, vocab_size, cache_dir, report).prepare(held_out)


@dataclass(frozen=True)
class _Preparation:
    recipe: Recipe
    source_map: SourceMap
    tokenizer_dir: Path
    vocab_size: int | None
    cache_dir: Path
    report: Report

    def prepare(self, wanted: ExampleSet) -> TokenCache:
        wanted = found_set(wanted, self.source_map, self.cache_dir)
        entry = open_or_build(
            self.cache_dir / "tokens", self._key(wanted), lambda writer: self._fill(writer, wanted), self.report
        )
        check_vocabulary(
            self.recipe,
            self.source_map,
            vocab_size=self.vocab_size,
            tokenizer=entry.statistics["tokenizer_vocabulary"],
            max_token_id=entry.statistics["max_token_id"],
        )
        self.report(f"{wanted.title}: {_summary(entry.statistics, self.recipe.data.max_length)}")
        return entry

    def _key(self, wanted: ExampleSet) -> str:
        data, digest = self.recipe.data, FileDigests(self.cache_dir / "digests")
        return cache_key(
            {
                "sources": [
                    [rows.identity(digest), source.format, dict(source.columns), source.max_samples]
                    for source, rows in zip(wanted.sources, wanted.found)
                ],
                "share": [wanted.share.side, wanted.share.fraction],
                "tokenizer": tokenizer_digest(self.tokenizer_dir, digest),
                "chat_template": _template_identity(data.chat_template, digest),
                "max_length": data.max_length,
                "overflow": data.overflow,
                "train_on_prompt": data.train_on_prompt,
            }
        )

    def _fill(self, writer: CacheWriter, wanted: ExampleSet) -> Mapping[str, Any]:
        # Imported only where something must be built: it brings the tokenizer library, transformers and Jinja.
        from understudy.data.filling import Filling

        filling = Filling(self.recipe, self.source_map, self.tokenizer_dir, self.vocab_size, self.report)
        return filling.fill(writer, wanted)


def _find(source: DataSource, key: str, source_map: SourceMap, cache_dir: Path) -> Rows:
    if source.format != "auto":
        check_columns(formats()[source.format], source.columns, key, source_map)
    with source_map.placing(f"{key}.path"):
        try:
            found = find_source(source, cache_dir=cache_dir)
        except OSError as error:  # such as a name too long, or a directory that may not be listed
            words = error.strerror or str(error)
            raise UserError(f"{source.path:.100} cannot be read ({words}); correct the path.") from error
    if isinstance(found, SourceFiles):
        _refuse_unread_fields(source, key, source_map)
    return found


def _refuse_unread_fields(source: DataSource, key: str, source_map: SourceMap) -> None:
    """Files have no configurations, and only a directory's may belong to splits."""
    if source.subset is not None:
        raise source_map.error(f"{key}.subset", f"{source.path} is no Hub data set; remove `subset`.")
    if source.split != "train" and not Path(source.path).expanduser().is_dir():
        raise source_map.error(
            f"{key}.split", f"{source.path} names files itself; remove `split`, or name their directory."
        )


def _refuse_inside_an_import() -> None:
    """A worker imports the main script; one that prepares data at its top level would wait there for its own parent."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing.spawn asks it
        raise UnderstudyError('put what prepares data under `if __name__ == "__main__":`; workers import this script.')


def _template_identity(template: str | None, digest: FileDigests) -> str | None:
    """A template file's digest, or the template itself or its name, as `understudy.models.tokenizer` tells them."""
    file = None if template is None else file_named(template)
    return template if file is None else digest(file)


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
