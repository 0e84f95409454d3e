"""Turns rows into tokens and supervised flags. Runs in worker processes: imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
import tokenizers

from understudy.data.builder import TokenChunk
from understudy.data.examples import Conversation, Document
from understudy.data.formats.format import Format
from understudy.data.formats.registry import formats
from understudy.data.rendering import Renderer
from understudy.data.row import Row
from understudy.data.template import ChatTemplate
from understudy.errors import UserError

__all__ = ["RowReader", "Tokenised", "Tokeniser", "TokeniserSettings"]

Flags = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TokeniserSettings:
    """All that a worker needs, as plain data."""

    tokenizer: str
    """The tokenizers library's JSON."""
    special_tokens: Mapping[str, str]
    """Names that templates may use, such as `eos_token`."""
    special_texts: tuple[str, ...]
    """Every special token's text."""
    chat_template: str | None
    tool_template: str | None
    """The template for conversations with tools, where the tokenizer has one of its own."""
    bos_id: int | None
    """Put before plain text; None when the tokenizer adds none or a template renders it."""
    eos_id: int | None
    """Put after plain text."""
    vocabulary: int
    """Tokens of the tokenizer, added ones aside."""
    max_length: int
    overflow: Literal["truncate", "drop", "split"]
    train_on_prompt: bool


@dataclass(frozen=True)
class Tokenised:
    chunk: TokenChunk
    fingerprints: npt.NDArray[np.uint64]
    """[E] hash of each example's tokens, to count exact duplicates."""
    counts: Counter[str]
    """rows, truncated, split, dropped_long, dropped_unsupervised, cut_to_prompt."""


class RowReader:
    """Reads rows of one source: its format and the columns' names. Errors name the row's file and line."""

    def __init__(self, format_name: str, columns: Mapping[str, str]) -> None:
        self._format: Format = formats()[format_name]
        self._columns = dict(columns)

    def read(self, row: Row) -> Conversation | Document:
        try:
            return self._format.parse(rename(row.columns(), self._columns))
        except UserError as error:
            raise row.error(error.message) from error


def rename(row: Mapping[str, object], columns: Mapping[str, str]) -> Mapping[str, object]:
    """`row` with `columns` (our field: their column) under our names. Raises `UserError` when one is missing."""
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            present = ", ".join(map(str, row)) or "none"
            raise UserError(f"the row has no column {theirs!r}, which columns.{ours} names (its columns: {present}).")
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken}
    return {**kept, **{ours: row[theirs] for ours, theirs in columns.items()}}


class Tokeniser:
    """Tokenises rows in batches. Deterministic: the same rows give the same examples in whatever batches they come."""

    def __init__(self, settings: TokeniserSettings) -> None:
        self._settings = settings
        self._tokenizer = tokenizers.Tokenizer.from_str(settings.tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._plain = _renderer(settings.chat_template, settings)
        with_tools = settings.tool_template
        self._with_tools = self._plain if with_tools == settings.chat_template else _renderer(with_tools, settings)

    def tokenise(self, rows: Sequence[Row], reader: RowReader, *, source: int) -> Tokenised:
        """Examples of `rows`, in order, as they will be trained on. Raises `UserError` with a row's file and line."""
        texts, spans, framed = [], [], []
        for row in rows:
            example = reader.read(row)
            rendered_text, supervised = self._render(example, row)
            texts.append(rendered_text)
            spans.append(supervised)
            framed.append(isinstance(example, Document))
        encodings = self._encode(texts, rows)
        bos, eos = _one(self._settings.bos_id), _one(self._settings.eos_id)
        ids = [
            encoding.ids if not plain else _framed(encoding.ids, bos, eos) for encoding, plain in zip(encodings, framed)
        ]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
        starts = np.cumsum(lengths) - lengths
        flags = np.zeros(len(tokens), np.uint8)
        for number, (encoding, start) in enumerate(zip(encodings, starts.tolist())):
            if self._settings.train_on_prompt:
                flags[start : start + lengths[number]] = 1
                continue
            prefix = int(framed[number] and lengths[number] - len(encoding) - len(eos) > 0)
            for span in spans[number]:
                first, last = tokens_of(encoding, *span)
                flags[start + prefix + first : start + prefix + last] = 1
            if framed[number]:
                flags[start + prefix + len(encoding) : start + lengths[number]] = 1
        return self._cut(tokens, flags, starts, lengths, rows, source)

    def text(self, row: Row, reader: RowReader) -> str:
        """The text of one row as it is tokenised."""
        return self._render(reader.read(row), row)[0]

    def _render(self, example: Conversation | Document, row: Row) -> tuple[str, list[tuple[int, int]]]:
        if isinstance(example, Document):
            if self._settings.eos_id is None:
                raise row.error(
                    "plain text must end in the end-of-sequence token, but the tokenizer has none; set one."
                )
            return example.text, [(example.prompt_length, len(example.text))]
        renderer = self._with_tools if example.tools else self._plain
        if renderer is None:
            raise row.error(
                "this is a conversation, but the tokenizer has no chat template; set data.chat_template to a Jinja "
                "string or a file."
            )
        try:
            return renderer.render(example)
        except UserError as error:
            raise row.error(error.message) from error

    def _encode(self, texts: list[str], rows: Sequence[Row]) -> list[tokenizers.Encoding]:
        try:
            return self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except (TypeError, UnicodeError):
            for text, row in zip(texts, rows):
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise row.error(
                        "the text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character."
                    ) from error
            raise

    def _cut(
        self,
        tokens: npt.NDArray[np.int32],
        flags: Flags,
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        rows: Sequence[Row],
        source: int,
    ) -> Tokenised:
        """Applies `max_length` and `overflow`, and leaves out what has nothing to train on."""
        counts: Counter[str] = Counter(rows=len(rows))
        supervised_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(flags, dtype=np.int64)])
        pieces: list[tuple[int, int, int, int]] = []
        for number, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist())):
            for begin, end in self._pieces(start, length, counts):
                trained = int(supervised_before[end] - supervised_before[begin + 1]) if end > begin else 0
                if trained:
                    pieces.append((begin, end, trained, rows[number].number))
                elif (
                    end - begin < length
                    and supervised_before[start + length] > supervised_before[min(start + 1, start + length)]
                ):
                    counts["cut_to_prompt"] += 1
                else:
                    counts["dropped_unsupervised"] += 1
        table = np.array(pieces, np.int64).reshape(-1, 4)
        examples = [tokens[begin:end] for begin, end, *_ in pieces]
        chunk = TokenChunk(
            tokens=np.concatenate(examples) if examples else tokens[:0],
            supervised=np.concatenate([flags[begin:end] for begin, end, *_ in pieces]) if pieces else flags[:0],
            lengths=(table[:, 1] - table[:, 0]).astype(np.int32),
            num_supervised=table[:, 2].astype(np.int32),
            row=table[:, 3].copy(),
            source=source,
        )
        return Tokenised(chunk, _fingerprints(examples), counts)

    def _pieces(self, start: int, length: int, counts: Counter[str]) -> Iterable[tuple[int, int]]:
        limit, end = self._settings.max_length, start + length
        if length <= limit:
            return ((start, end),)
        if self._settings.overflow == "truncate":
            counts["truncated"] += 1
            return ((start, start + limit),)
        if self._settings.overflow == "drop":
            counts["dropped_long"] += 1
            return ()
        counts["split"] += 1
        return [(begin, min(begin + limit, end)) for begin in range(start, end, limit)]


def tokens_of(encoding: tokenizers.Encoding, start: int, end: int) -> tuple[int, int]:
    """Tokens [first, last) that overlap characters [start, end); an empty range when none does.

    Asks the encoding for the two ends only: a list of all offsets takes longer to make than the tokens. A character can
    belong to several tokens, or to none: offsets may leave out white space, down to tokens of no width.
    """
    if start >= end:
        return 0, 0
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is None or last is None:
        offsets = np.array(encoding.offsets).reshape(-1, 2)
        overlapping = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
        return (int(overlapping[0]), int(overlapping[-1]) + 1) if len(overlapping) else (0, 0)
    count = len(encoding)
    while last + 1 < count and (span := encoding.token_to_chars(last + 1)) is not None and span[0] < end:
        last += 1
    return first, last + 1


def _renderer(template: str | None, settings: TokeniserSettings) -> Renderer | None:
    if template is None:
        return None
    return Renderer(ChatTemplate(template, settings.special_tokens), settings.special_texts)


def _framed(ids: list[int], bos: list[int], eos: list[int]) -> list[int]:
    """Plain text between its begin and end tokens; a begin token that the text holds itself is not doubled."""
    return [*(bos if ids[:1] != bos else []), *ids, *eos]


def _one(token: int | None) -> list[int]:
    return [] if token is None else [token]


def _fingerprints(examples: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.uint64]:
    digests = b"".join(hashlib.blake2b(example.tobytes(), digest_size=8).digest() for example in examples)
    return np.frombuffer(digests, np.uint64)
