"""Which positions of an example mean the same to two tokenizers: where both say next what comes after the same text.

The k-th supervised span of one is held against the k-th of the other, as bytes. Shape letters: L tokens, A aligned
positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from understudy.models.token_bytes import SPECIAL, TokenBytes

__all__ = ["Aligned", "Reading", "align"]

WHITE_SPACE = b" \t\n\r\v\f"


class Reading(NamedTuple):
    """An example as one tokenizer reads it."""

    tokens: npt.NDArray[np.int32]
    """[L]"""
    supervised: npt.NDArray[np.uint8]
    """[L] 1 where the token is supervised."""


class Aligned(NamedTuple):
    """Positions at which both predict, in order. What is predicted at a position is the token after it."""

    student: npt.NDArray[np.int64]
    """[A]"""
    teacher: npt.NDArray[np.int64]
    """[A]"""
    same: npt.NDArray[np.bool_]
    """[A] whether both predict the same there, not the one a part of the other's."""


def align(student: Reading, teacher: Reading, ours: TokenBytes, theirs: TokenBytes) -> Aligned:
    """The positions of an example that both read alike, by the bytes of the student's tokens and of the teacher's.

    Special tokens correspond where they stand in the same place, such as at the end of a turn. What stands before the
    text of a turn may differ: white space, or what a template puts there. Where the texts part, what is before that is
    still aligned, if there is anything; later spans are not, unless one text goes on where the other ended.
    """
    none = np.zeros(0, np.int64)
    found = [Aligned(none, none, none.astype(np.bool_))]
    for one, other in zip(_spans(student, ours), _spans(teacher, theirs)):
        pair = _Pair.of(one.text, other.text)
        beginnings, i, j = np.intersect1d(
            one.offsets - pair.heads[0], other.offsets - pair.heads[1], return_indices=True
        )
        # The first token of an example is nobody's successor.
        alike = (beginnings >= pair.first) & (beginnings <= pair.last) & (one.start + i > 0) & (other.start + j > 0)
        i, j = i[alike], j[alike]
        same = (one.lengths[i] == other.lengths[j]) & (beginnings[alike] + one.lengths[i] <= pair.last)
        found.append(Aligned(one.start + i - 1, other.start + j - 1, same))
        if not pair.goes_on:
            break
    return Aligned(*(np.concatenate(parts) for parts in zip(*found)))


class _Span(NamedTuple):
    start: int
    """Its first token."""
    text: bytes
    offsets: npt.NDArray[np.int64]
    """Where each of its tokens begins in the text."""
    lengths: npt.NDArray[np.int64]
    """Bytes of each."""


def _spans(reading: Reading, tokens: TokenBytes) -> list[_Span]:
    edges = np.flatnonzero(np.diff(reading.supervised.astype(np.int8), prepend=0, append=0))
    spans = []
    for start, end in edges.reshape(-1, 2).tolist():
        texts = [tokens.texts[token] for token in reading.tokens[start:end].tolist()]
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        spans.append(_Span(start, b"".join(texts), np.cumsum(lengths) - lengths, lengths))
    return spans


class _Pair(NamedTuple):
    """Two texts, laid over each other. Offsets count from where the text of the turn begins in each."""

    heads: tuple[int, int]
    """Bytes before that."""
    first: int
    """The first offset at which they are alike: negative where they begin alike."""
    last: int
    """The last one; before the first where nothing is alike."""
    goes_on: bool
    """They differ in their ends at most."""

    @staticmethod
    def of(student: bytes, teacher: bytes) -> _Pair:
        texts = [student.lstrip(WHITE_SPACE), teacher.lstrip(WHITE_SPACE)]
        cores = [text.rstrip(WHITE_SPACE + SPECIAL) for text in texts]
        shorter, longer = (0, 1) if len(cores[0]) <= len(cores[1]) else (1, 0)
        head = len(cores[longer]) - len(cores[shorter])
        if cores[shorter] and cores[longer].endswith(cores[shorter]) and not cores[longer].startswith(cores[shorter]):
            texts[longer], cores[longer] = texts[longer][head:], cores[shorter]
        heads = len(student) - len(texts[0]), len(teacher) - len(texts[1])
        first = -heads[0] if student[: heads[0]] == teacher[: heads[1]] else 0
        common = _common_prefix(*texts)
        # Else any two texts would be aligned where they begin.
        last = common if common or not all(texts) else first - 1
        return _Pair(heads, first, last, common >= min(map(len, cores)))


def _common_prefix(one: bytes, other: bytes) -> int:
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    differing = np.frombuffer(one, np.uint8, length) != np.frombuffer(other, np.uint8, length)
    return int(differing.argmax())
