"""What the training data asks: each conversation up to where its last answer begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from understudy.data.example_set import training_set
from understudy.data.examples import Conversation, Document, Message
from understudy.data.prepare import found_set
from understudy.data.row import Row
from understudy.data.row_chunks import row_chunks
from understudy.data.tokenisation import RowReader
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap

__all__ = ["Prompt", "Prompts", "training_prompts"]

_ASKING = ("user", "tool")
"""Roles that an assistant answers."""


@dataclass(frozen=True)
class Prompt:
    source: int
    """Number of its source in the recipe, from 0."""
    row: int
    """In its source, from 0."""
    messages: list[Message]
    """None of them the answer."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that may be called."""


@dataclass
class Prompts:
    """In the data's order."""

    asked: list[Prompt] = field(default_factory=list)
    without: int = 0
    """Rows that ask nothing."""


def training_prompts(
    recipe: Recipe, source_map: SourceMap, cache_dir: Path, most: int | None, report: Callable[[str], None]
) -> Prompts:
    """The first `most` prompts of the training data; all of them when None. A prompt that is a string, of the format
    prompt_completion, becomes the user's message.

    Raises `UserError` at the recipe's line of plain text, which asks nothing, and where no row has a prompt; and at the
    file and line of bad data.
    """

    def refuse_text(number: int, format_name: str) -> None:
        if format_name == "text":
            raise source_map.error(
                f"{wanted.key}.{number}.path",
                f"{wanted.sources[number].path} is plain text, which asks nothing that could be answered; name "
                "conversations, or prompts with completions.",
            )

    wanted = found_set(training_set(recipe), source_map, cache_dir)
    prompts = Prompts()
    for chunk in row_chunks(wanted, source_map, report, begin_source=refuse_text):
        reader = RowReader(chunk.format_name, chunk.columns)
        for row in chunk.rows:
            if len(prompts.asked) == most:
                return prompts
            example = reader.read(row)
            messages = _asked(example)
            if messages is None:
                prompts.without += 1
            else:
                _require_text(messages, row)
                tools = example.tools if isinstance(example, Conversation) else None
                prompts.asked.append(Prompt(chunk.source, row.number, messages, tools))
    if not prompts.asked:
        raise source_map.error(
            wanted.key, "no row of this data has a prompt; check format, columns and the roles of the messages."
        )
    return prompts


def _asked(example: Conversation | Document) -> list[Message] | None:
    """All messages before the last assistant turn; None where that leaves nobody who asks. A conversation that does not
    end with the assistant waits for its answer as it is."""
    if isinstance(example, Document):
        messages = [{"role": "user", "content": example.text[: example.prompt_length]}]
    else:
        messages = list(example.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
    asks = any(message["role"] in _ASKING and message["content"].strip() for message in messages)
    return messages if asks else None


def _require_text(messages: list[Message], row: Row) -> None:
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise row.error(
            "the text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character."
        ) from error
