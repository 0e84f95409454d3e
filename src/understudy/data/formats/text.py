"""Plain text, one document a row."""

from __future__ import annotations

from understudy.data.examples import Document
from understudy.data.formats.format import Row, required
from understudy.errors import UserError


class Text:
    name = "text"
    columns = ("text",)

    def recognises(self, row: Row) -> bool:
        return "text" in row and not {"messages", "conversations", "instruction", "prompt"} & set(row)

    def parse(self, row: Row) -> Document:
        text = required(row, "text", self.name)
        if not isinstance(text, str):
            raise UserError(f"the column 'text' must hold text, but holds {text!r:.40}.")
        return Document(text)


FORMAT = Text()
