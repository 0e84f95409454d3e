"""Alpaca: instruction, optional input, output; optionally a system prompt and earlier turns in `history`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from understudy.data.examples import Conversation, Message
from understudy.data.formats.format import Row, required, text_of
from understudy.errors import UserError


class Alpaca:
    name = "alpaca"
    columns = ("instruction", "output", "input", "system", "history")

    def recognises(self, row: Row) -> bool:
        return "instruction" in row and "output" in row and not {"messages", "conversations"} & set(row)

    def parse(self, row: Row) -> Conversation:
        instruction = text_of(required(row, "instruction", self.name), "instruction")
        output = text_of(required(row, "output", self.name), "output")
        question = text_of(row.get("input"), "input")
        messages: list[Message] = []
        if system := text_of(row.get("system"), "system"):
            messages.append({"role": "system", "content": system})
        for asked, answered in _history(row.get("history")):
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        prompt = f"{instruction}\n{question}" if question else instruction
        messages.append({"role": "user", "content": prompt})
        messages.append({"role": "assistant", "content": output})
        return Conversation(messages)


def _history(value: Any) -> list[tuple[str, str]]:
    if value is None or value == "":
        return []
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise UserError("the column 'history' must be a list of [instruction, output] pairs.")
    turns = []
    for turn in value:
        if not isinstance(turn, Sequence) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise UserError("the column 'history' must be a list of [instruction, output] pairs of strings.")
        turns.append((turn[0], turn[1]))
    return turns


FORMAT = Alpaca()
