"""Renders conversations and finds what the assistant says in them, for any chat template.

A turn is found by rendering prefixes of the conversation: it starts where the prompt for it ends, and ends where the
conversation up to it ends. Templates that render a prefix differently from the whole (they drop earlier reasoning, move
the system prompt, refuse an unanswered question) are compared with a rendering in which only that turn was replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from understudy.data.examples import Conversation, Message
from understudy.data.template import ChatTemplate, TemplateError
from understudy.errors import UserError

__all__ = ["Rendered", "Renderer"]


class Rendered(NamedTuple):
    text: str
    spans: list[tuple[int, int]]
    """Characters [start, end) that the assistant says, end-of-turn token included, in order."""


@dataclass(frozen=True)
class _Shape:
    """What this template puts around the assistant's words: learnt from one turn, recognised in the next."""

    header: str
    footer: str


class Renderer:
    """Renders conversations with one template. `special_tokens` are the texts of the tokenizer's special tokens."""

    def __init__(self, template: ChatTemplate, special_tokens: Sequence[str]) -> None:
        self._template = template
        self._special_tokens = tuple(token for token in special_tokens if token.strip())
        self._leading_special = re.compile(
            r"\s*(?:" + "|".join(map(re.escape, sorted(self._special_tokens, key=len, reverse=True))) + ")"
            if self._special_tokens
            else r"(?!)"
        )
        self._shape: _Shape | None = None

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation's text and the assistant's spans in it.

        Raises `TemplateError` when the template raises, `UserError` when a turn cannot be found in the text; both
        without a place.
        """
        text = self._template.render(conversation.messages, conversation.tools)
        spans: list[tuple[int, int]] = []
        for turn in _assistant_turns(conversation):
            span = self._recognise(conversation, turn, text) or self._find(conversation, turn, text)
            if span is None:
                continue
            if spans and span[0] < spans[-1][1]:
                raise _lost(turn)
            spans.append(span)
        return Rendered(text, spans)

    def _recognise(self, conversation: Conversation, turn: int, text: str) -> tuple[int, int] | None:
        """The turn, where it stands in the text word for word, just once, in the shape known from earlier ones.

        Saves a rendering or two a turn. The last turn must end the text; any other must not be ambiguous.
        """
        message = conversation.messages[turn]
        if self._shape is None or not message["content"] or len(message) > 2:
            return None
        framed = self._shape.header + message["content"] + self._shape.footer
        start = text.rfind(framed)
        if start < 0:
            return None
        end = start + len(framed)
        if turn == len(conversation.messages) - 1:
            unambiguous = not text[end:].strip()
        else:
            unambiguous = text.find(framed) == start
        return (start + len(self._shape.header), end) if unambiguous else None

    def _find(self, conversation: Conversation, turn: int, text: str) -> tuple[int, int] | None:
        """The turn's span by rendering; None when the template leaves the turn out."""
        start, end = self._prompt_end(conversation, turn, text), self._turn_end(conversation, turn, text)
        if start is None or end is None:
            replaced = self._by_replacement(conversation, turn, text)
            if replaced is None:
                return None
            start = replaced[0] if start is None else start
            end = replaced[1] if end is None else end
        if not start <= end:
            raise _lost(turn)
        end = self._without_trailing_space(text, start, end)
        _require_calls(conversation.messages[turn], turn, text[start:end])
        self._learn(conversation, turn, text, start, end)
        return (start, end) if start < end else None

    def _prompt_end(self, conversation: Conversation, turn: int, text: str) -> int | None:
        prompt = self._prefix(conversation, turn, add_generation_prompt=True)
        return len(prompt) if prompt is not None and text.startswith(prompt) else None

    def _turn_end(self, conversation: Conversation, turn: int, text: str) -> int | None:
        if turn == len(conversation.messages) - 1:
            return len(text)
        prefix = self._prefix(conversation, turn + 1, add_generation_prompt=False)
        return len(prefix) if prefix is not None and text.startswith(prefix) else None

    def _prefix(self, conversation: Conversation, count: int, *, add_generation_prompt: bool) -> str | None:
        """The first `count` messages rendered; None when the template refuses so few."""
        try:
            return self._template.render(
                conversation.messages[:count], conversation.tools, add_generation_prompt=add_generation_prompt
            )
        except TemplateError:
            return None

    def _by_replacement(self, conversation: Conversation, turn: int, text: str) -> tuple[int, int] | None:
        """The turn's span, by rendering the whole conversation with that turn's words replaced by a marker."""
        messages = conversation.messages
        for marker in (m for m in ("QzMarkedWordsXj", "9vUnlikelyTurn4w") if m not in text):
            for replacement in _replacements(messages[turn], marker):
                try:
                    marked = self._template.render(
                        [*messages[:turn], replacement, *messages[turn + 1 :]], conversation.tools
                    )
                except TemplateError:
                    continue
                if marker not in marked:
                    if marked == text:
                        return None
                    continue
                before, after = marked[: marked.find(marker)], marked[marked.rfind(marker) + len(marker) :]
                if text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text):
                    footer = self._footer([*messages[:turn], replacement], conversation, marker, after)
                    return len(before), len(text) - len(after) + len(footer)
        raise _lost(turn)

    def _footer(self, messages: Sequence[Message], conversation: Conversation, marker: str, after: str) -> str:
        """The part of `after` that closes the turn: what follows it also where it is the last of the conversation."""
        try:
            marked = self._template.render(messages, conversation.tools)
        except TemplateError:
            marked = ""
        if marker in marked:
            return _common_prefix(after, marked[marked.rfind(marker) + len(marker) :])
        closing = self._leading_special.match(after)
        return closing.group() if closing else ""

    def _without_trailing_space(self, text: str, start: int, end: int) -> int:
        """Where the turn's last special token ends, if only white space follows it."""
        stripped = text[start:end].rstrip()
        return start + len(stripped) if self._special_tokens and stripped.endswith(self._special_tokens) else end

    def _learn(self, conversation: Conversation, turn: int, text: str, start: int, end: int) -> None:
        """Notes the shape of a plain turn, once: a generation prompt, the words as they are, an end-of-turn token."""
        content = conversation.messages[turn]["content"]
        if self._shape is not None or not content or not text.startswith(content, start):
            return
        asked = self._prefix(conversation, turn, add_generation_prompt=False)
        footer = text[start + len(content) : end]
        if asked is not None and text.startswith(asked) and len(asked) < start and footer in self._special_tokens:
            self._shape = _Shape(header=text[len(asked) : start], footer=footer)


def _assistant_turns(conversation: Conversation) -> Iterator[int]:
    for number in range(conversation.supervised_from, len(conversation.messages)):
        if conversation.messages[number]["role"] == "assistant":
            yield number


def _replacements(message: Message, marker: str) -> Iterator[Message]:
    """The turn with its words replaced, in the ways that templates may accept."""
    reasoning: Message = {name: marker for name in ("thinking", "reasoning_content", "reasoning") if name in message}
    plain: Message = {"role": message["role"], "content": marker}
    if "tool_calls" not in message:
        yield {**plain, **reasoning}
    if reasoning or "tool_calls" in message:
        yield plain
    if "tool_calls" in message:
        calls = [{**call, "function": {**call["function"], "name": marker}} for call in message["tool_calls"]]
        content = marker if message["content"] else ""
        yield {**message, **reasoning, "content": content, "tool_calls": calls}


def _common_prefix(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[:length]


def _require_calls(message: Message, turn: int, said: str) -> None:
    """Raises `UserError` when the template left out a tool call: many render only role and content, and the model would
    learn to say nothing instead."""
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in said:
            raise UserError(
                f"the chat template leaves out the tool call {call['function']['name']!r} of message {turn + 1}; set "
                "data.chat_template to a template that renders tool calls."
            )


def _lost(turn: int) -> UserError:
    return UserError(
        f"the chat template renders this conversation so that message {turn + 1}, the assistant's, cannot be found in "
        "the text; set data.chat_template to a template that renders every turn in order."
    )
