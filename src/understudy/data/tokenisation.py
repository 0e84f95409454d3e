"""Turns rows into tokens and supervised flags. Runs in worker processes: imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers

from understudy.data.column_names import rename
from understudy.data.cutting import Encoded, Overflow, Tokenised, cut
from understudy.data.examples import Conversation, Document
from understudy.data.formats.format import Format
from understudy.data.formats.registry import formats
from understudy.data.rendering import Renderer
from understudy.data.row import Row
from understudy.data.template import ChatTemplate
from understudy.errors import UserError

__all__ = ["RowReader", "Tokeniser", "TokeniserSettings", "tokens_of"]


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
    overflow: Overflow
    train_on_prompt: bool


class _Text(NamedTuple):
    """One example before it is encoded."""

    text: str
    spans: list[tuple[int, int]]
    """Supervised characters [start, end)."""
    plain: bool
    """Not rendered by a template: begin and end tokens are still to be added."""


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
        texts = [self._render(reader.read(row), row) for row in rows]
        encodings = self._encode([text.text for text in texts], rows)
        ids = [self._framed(encoding.ids) if text.plain else encoding.ids for text, encoding in zip(texts, encodings)]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
        supervised = np.zeros(len(tokens), np.uint8)
        end = 0
        for text, encoding, length in zip(texts, encodings, lengths.tolist()):
            self._supervise(supervised[end : end + length], text, encoding)
            end += length
        encoded = Encoded(tokens, supervised, lengths, [row.number for row in rows])
        return cut(encoded, source=source, max_length=self._settings.max_length, overflow=self._settings.overflow)

    def text(self, row: Row, reader: RowReader) -> str:
        """The text of one row as it is tokenised."""
        return self._render(reader.read(row), row).text

    def _render(self, example: Conversation | Document, row: Row) -> _Text:
        if isinstance(example, Document):
            if self._settings.eos_id is None:
                raise row.error(
                    "plain text must end in the end-of-sequence token, but the tokenizer has none; set one."
                )
            return _Text(example.text, [(example.prompt_length, len(example.text))], plain=True)
        renderer = self._with_tools if example.tools else self._plain
        if renderer is None:
            raise row.error(
                "this is a conversation, but the tokenizer has no chat template; set data.chat_template to a Jinja "
                "string or a file."
            )
        try:
            return _Text(*renderer.render(example), plain=False)
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

    def _framed(self, ids: list[int]) -> list[int]:
        """Plain text between its begin and end tokens; a begin token that the text holds itself is not doubled."""
        bos, eos = self._settings.bos_id, self._settings.eos_id
        assert eos is not None, "plain text is refused without one"
        return [*ids, eos] if bos is None or ids[:1] == [bos] else [bos, *ids, eos]

    def _supervise(self, flags: npt.NDArray[np.uint8], text: _Text, encoding: tokenizers.Encoding) -> None:
        """Sets the flags of one example, whose tokens are the encoding's, framed where the text is plain."""
        if self._settings.train_on_prompt:
            flags[:] = 1
            return
        before = int(text.plain and len(flags) == len(encoding) + 2)
        for span in text.spans:
            first, last = tokens_of(encoding, *span)
            flags[before + first : before + last] = 1
        if text.plain:
            flags[-1] = 1


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
