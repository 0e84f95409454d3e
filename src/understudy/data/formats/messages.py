"""OpenAI chat messages: system, user, assistant with tool calls, tool results; optionally `tools`."""

from __future__ import annotations

from understudy.data.examples import Conversation
from understudy.data.formats.format import Row, required
from understudy.data.messages import read_messages, read_tools


class Messages:
    name = "messages"
    columns = ("messages", "tools")

    def recognises(self, row: Row) -> bool:
        return "messages" in row

    def parse(self, row: Row) -> Conversation:
        messages = read_messages(required(row, "messages", self.name), "the column 'messages'")
        return Conversation(messages, read_tools(row.get("tools"), "the column 'tools'"))


FORMAT = Messages()
