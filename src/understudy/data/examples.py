"""What a row of a data set becomes: a conversation or a text, not yet tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Conversation", "Document", "Message"]

Message = dict[str, Any]
"""`role` and `content`, and where they apply `tool_calls`, `tool_call_id`, `name`, `reasoning_content`: the mapping
that chat templates read."""


@dataclass(frozen=True)
class Conversation:
    """Turns to be rendered by a chat template."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools the assistant may call."""
    supervised_from: int = 0
    """Index of the first message whose assistant turn is supervised."""


@dataclass(frozen=True)
class Document:
    """Plain text, trained on as it is and followed by the end-of-sequence token."""

    text: str
    prompt_length: int = 0
    """Characters at its start that are not supervised."""
