"""ShareGPT: `conversations` of {from, value}; optionally `system` and `tools`. Turns of {role, content} pass too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from understudy.data.examples import Conversation, Message
from understudy.data.formats.format import Row, required, text_of
from understudy.data.messages import read_messages, read_tools
from understudy.errors import UserError

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


class ShareGPT:
    name = "sharegpt"
    columns = ("conversations", "system", "tools")

    def recognises(self, row: Row) -> bool:
        return "conversations" in row and "messages" not in row

    def parse(self, row: Row) -> Conversation:
        turns = required(row, "conversations", self.name)
        if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)):
            raise UserError("the column 'conversations' must be a list of {from, value} turns.")
        named = [_message(turn, number) for number, turn in enumerate(turns, 1)]
        system = text_of(row.get("system"), "system")
        if system and not (named and named[0].get("role") == "system"):
            named.insert(0, {"role": "system", "content": system})
        messages = read_messages(named, "the column 'conversations'")
        return Conversation(messages, read_tools(row.get("tools"), "the column 'tools'"))


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise UserError(f"turn {number} of the column 'conversations' must be an object with from and value.")
    if "from" not in turn:
        return dict(turn)
    speaker, value = turn["from"], turn.get("value")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise UserError(f"turn {number} of 'conversations' is from {speaker!r}; known are {', '.join(_ROLES)}.")
    if speaker == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": _calls(value, number)}
    return {"role": _ROLES[speaker], "content": value}


def _calls(value: Any, number: int) -> list[Any]:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise UserError(f"turn {number} of 'conversations' is a function call that is not valid JSON.") from error
    return calls if isinstance(calls, list) else [calls]


FORMAT = ShareGPT()
