"""Prompt and completion, two strings (joined as they are) or two lists of messages (rendered by the template)."""

from __future__ import annotations

from understudy.data.examples import Conversation, Document
from understudy.data.formats.format import Row, required
from understudy.data.messages import read_messages, read_tools
from understudy.errors import UserError


class PromptCompletion:
    name = "prompt_completion"
    columns = ("prompt", "completion", "tools")

    def recognises(self, row: Row) -> bool:
        return "prompt" in row and "completion" in row and "messages" not in row

    def parse(self, row: Row) -> Conversation | Document:
        prompt = required(row, "prompt", self.name)
        completion = required(row, "completion", self.name)
        if isinstance(prompt, str) and isinstance(completion, str):
            return Document(prompt + completion, prompt_length=len(prompt))
        if isinstance(prompt, str) or isinstance(completion, str) or prompt is None or completion is None:
            raise UserError("prompt and completion must both be strings or both be lists of messages.")
        asked = read_messages(prompt, "the column 'prompt'")
        answered = read_messages(completion, "the column 'completion'")
        tools = read_tools(row.get("tools"), "the column 'tools'")
        return Conversation(asked + answered, tools, supervised_from=len(asked))


FORMAT = PromptCompletion()
