"""A teacher with another tokenizer: its own reading of a recipe's data, and where that says what the student's does.

All of it once, in one process, before any other starts (P7).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from understudy.data.cache import TokenCache
from understudy.data.prepare import prepare_data, prepare_evaluation_data
from understudy.errors import UserError
from understudy.models.made_once import made_once
from understudy.models.source import tokenizer_directory
from understudy.models.token_bytes import TokenBytes, matched_tokens, read_token_bytes
from understudy.models.tokenizer import load_tokenizer
from understudy.objectives.teachers.aligned_documents import (
    FORMAT_VERSION,
    AlignedDocument,
    AlignedDocuments,
    AlignmentCounts,
    write_aligned_documents,
)
from understudy.objectives.teachers.alignment import Reading, align
from understudy.objectives.teachers.cache_format import example_key
from understudy.recipe.environment import cache_directory
from understudy.recipe.schema import Model, Recipe
from understudy.recipe.source_map import SourceMap
from understudy.recipe.teachers import LocalTeacher
from understudy.training.companions import special_ids
from understudy.training.job import TeacherPlace
from understudy.training.teacher_model import OpenedTeacher, require_positions

__all__ = ["LEAST_ALIGNED", "align_teacher"]

LEAST_ALIGNED = 0.01
"""Of the supervised tokens; with fewer something is wrong."""


def align_teacher(
    recipe: Recipe,
    sources: SourceMap,
    section: LocalTeacher,
    opened: OpenedTeacher,
    student_tokenizer: Any,
    student_vocabulary: int,
    train: TokenCache | None,
    evaluation: TokenCache | None,
    report: Callable[[str], None],
) -> TeacherPlace:
    """Where the teacher is, and its reading of the student's examples. The student has `student_vocabulary` classes.
    `report` gets a line about how much of both is the same.

    Raises `UserError` when the teacher cannot read the data, has fewer positions than it takes, or reads next to
    nothing of it as the student does.
    """
    directory = tokenizer_directory(Model(path=str(opened.directory)))
    tokenizer = load_tokenizer(directory)
    vocabulary = opened.model.config.get_text_config().vocab_size
    data = [cache for cache in (train, evaluation) if cache is not None]
    read = _own_reading(recipe, sources, section, opened, directory, train is not None, report)
    assert len(read) == len(data), "the recipe says what there is"
    require_positions(opened, max(int(cache.lengths.max()) for cache in read))
    digests = [cache.digest for cache in (*data, *read)]
    named = hashlib.sha256(json.dumps([FORMAT_VERSION, digests, student_vocabulary, vocabulary]).encode()).hexdigest()

    def build(building: Path) -> None:
        report(f"aligning what the teacher {section.path} reads with what the student reads …")
        ours, theirs = (read_token_bytes(each, special_ids(each)) for each in (student_tokenizer, tokenizer))
        documents, pairs, seen = _aligned(data, read, ours, theirs)
        classes = min(len(ours), student_vocabulary), min(len(theirs), vocabulary)
        if student_tokenizer.get_vocab() == tokenizer.get_vocab():
            matched = np.arange(min(classes)).repeat(2).reshape(-1, 2)
        else:
            ends = (student_tokenizer.eos_token_id, tokenizer.eos_token_id)
            matched = matched_tokens(ours, theirs, pairs if None in ends else [*pairs, ends])
            matched = matched[(matched < classes).all(axis=1)]
        counts = AlignmentCounts(*seen, len(matched), *classes)
        write_aligned_documents(building, documents, matched, counts)

    place = made_once(cache_directory() / "alignments" / named[:32], build)
    _judge(AlignedDocuments(place).counts, section.path, report)
    return TeacherPlace(opened.directory, None, 0, alignment=place, examples=tuple(cache.path for cache in read))


def _own_reading(
    recipe: Recipe,
    sources: SourceMap,
    section: LocalTeacher,
    opened: OpenedTeacher,
    tokenizer: Path,
    training: bool,
    report: Callable[[str], None],
) -> list[TokenCache]:
    """The recipe's examples, those for `training` too or for evaluation alone, with the teacher's tokenizer and its own
    chat template."""
    data = recipe.data.model_copy(update={"chat_template": None})
    own = recipe.model_copy(update={"model": Model(path=str(opened.directory)), "data": data})
    settings: dict[str, Any] = {
        "tokenizer_dir": tokenizer,
        "vocab_size": opened.model.config.get_text_config().vocab_size,
        "cache_dir": cache_directory(),
        "report": lambda line: report(f"as the teacher {section.path} reads it: {line}"),
    }
    try:
        if not training:
            evaluation = prepare_evaluation_data(own, sources, **settings)
            return [] if evaluation is None else [evaluation]
        prepared = prepare_data(own, sources, **settings)
        return [TokenCache.open(path) for path in (prepared.train, prepared.evaluation) if path is not None]
    except UserError as error:
        if error.file is not None and Path(error.file).is_relative_to(cache_directory()):
            raise
        # The student reads the same rows, so the fix is another than the error says, and its place in the recipe too.
        in_data = error.file != sources.file
        raise UserError(
            f"the teacher {section.path} cannot read this with its own tokenizer and chat template: "
            f"{error.message.split('; ')[0].rstrip('.')}; name a teacher that can.",
            file=error.file if in_data else None,
            line=error.line if in_data else None,
        ) from error


def _aligned(
    data: Sequence[TokenCache], read: Sequence[TokenCache], ours: TokenBytes, theirs: TokenBytes
) -> tuple[dict[bytes, AlignedDocument], list[tuple[int, int]], tuple[int, int, int]]:
    """Every different document by its key, the first of equal ones; special tokens that stand in the same places, the
    most frequent first; supervised tokens, those of them that are aligned, and those of these that are the same."""
    documents: dict[bytes, AlignedDocument] = {}
    pairs: Counter[tuple[int, int]] = Counter()
    supervised = aligned = same = before = 0
    for cache, other in zip(data, read, strict=True):
        for i, j in enumerate(_counterparts(cache, other).tolist()):
            one = Reading(cache.tokens(i), cache.supervised(i))
            predicted = np.append(one.supervised[1:], np.uint8(0))
            key = example_key(one.tokens, predicted)
            if key not in documents:
                two = (
                    Reading(other.tokens(j), other.supervised(j)) if j >= 0 else Reading(one.tokens[:0], predicted[:0])
                )
                at = align(one, two, ours, theirs)
                rows = (np.cumsum(predicted, dtype=np.int32) - 1)[at.student]
                documents[key] = AlignedDocument(before + j, rows, at.teacher.astype(np.int32), at.same)
                following = one.tokens[at.student + 1], two.tokens[at.teacher + 1]
                special = ours.special[following[0]] & theirs.special[following[1]]
                pairs.update(zip(following[0][special].tolist(), following[1][special].tolist()))
            supervised += int(predicted.sum())
            aligned += len(documents[key].rows)
            same += int(documents[key].same.sum())
        before += len(other)
    return documents, [pair for pair, _ in pairs.most_common()], (supervised, aligned, same)


def _counterparts(ours: TokenCache, theirs: TokenCache) -> npt.NDArray[np.int64]:
    """[E] which example of `theirs` comes from the same row as each of `ours`; −1 where none does."""
    rows = 1 + max(int(ours.row.max()), int(theirs.row.max()))
    own, other = (cache.source * np.int64(rows) + cache.row for cache in (ours, theirs))
    order = np.argsort(other)
    places = np.searchsorted(other, own, sorter=order)
    found = order[np.minimum(places, len(other) - 1)]
    return np.where(other[found] == own, found, -1)


def _judge(counts: AlignmentCounts, name: str, report: Callable[[str], None]) -> None:
    share = counts.aligned / counts.supervised
    if share < LEAST_ALIGNED:
        raise UserError(
            f"the teacher {name} reads {share:.1%} of the supervised tokens' beginnings as the student does, too few "
            "to learn from: one of the two chat templates changes what the assistant says, or one of the tokenizers "
            "loses it; name another teacher, or set data.chat_template."
        )
    whole = counts.same / counts.supervised
    report(
        f"the teacher {name} reads {share:.1%} of the supervised tokens' beginnings alike, and {whole:.1%} of whole "
        f"tokens; {counts.matched:,} of {counts.student_classes:,} tokens are in both vocabularies."
    )
