"""Reads a list of chat messages as users write them into the one shape that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from understudy.data.examples import Message
from understudy.errors import UserError

__all__ = ["read_messages", "read_text", "read_tool_calls", "read_tools"]

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def read_messages(value: Any, where: str) -> list[Message]:
    """A list of OpenAI-style messages, validated. `where` names the column in error messages.

    Columnar files fill every message with every key; keys that hold null are taken as absent.
    """
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise UserError(f"{where} must be a list of messages, not {_kind(value)}.")
    if not value:
        raise UserError(f"{where} holds no messages.")
    return [_message(message, f"message {number} of {where}") for number, message in enumerate(value, 1)]


def read_text(value: Any, where: str) -> str:
    """A string, or a list of OpenAI content parts of type text, joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return "".join(_part(part, where) for part in value)
    raise UserError(f"{where} must be a string or a list of text parts, not {_kind(value)}.")


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Tool schemas: a list of objects, or the same as a JSON string; None where there are none."""
    value = _from_json(value, where) if isinstance(value, str) and value.strip() else value
    if value is None or value == "" or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise UserError(f"{where} must be a list of tool schemas, or the same as a JSON string.")
    return [dict(tool) for tool in value]


def read_tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls as `{"type": "function", "function": {"name", "arguments"}}`; a bare `{"name", "arguments"}` too.

    Arguments given as a JSON string become the object it holds: templates write them with `tojson`.
    """
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        raise UserError(f"{where} must be a list of tool calls, not {_kind(value)}.")
    return [_tool_call(call, where) for call in value]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise UserError(f"{where} must be an object with role and content, not {_kind(message)}.")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        shown = "has no role" if role is None else f"has the role {role!r}"
        raise UserError(f"{where} {shown}; the roles are {', '.join(ROLES)}.")
    if content is None and not calls:
        raise UserError(f"{where} has neither content nor tool calls.")
    if calls and role != "assistant":
        raise UserError(f"{where} has tool calls, which only the assistant can make, but its role is {role!r}.")
    read: Message = {"role": role, "content": "" if content is None else read_text(content, f"the content of {where}")}
    if calls:
        read["tool_calls"] = read_tool_calls(calls, f"tool_calls of {where}")
    for name in ("name", "tool_call_id", *REASONING_FIELDS):
        if (text := message.get(name)) is not None:
            read[name] = read_text(text, f"{name} of {where}")
    return _with_reasoning(read)


def _with_reasoning(message: Message) -> Message:
    """Reasoning under the names that templates read, as `transformers` passes it."""
    reasoning = next((message[name] for name in REASONING_FIELDS if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else None
    raise UserError(f"{where} holds a part of type {kind!r}; only text parts can be trained on.")


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} must name the function and its arguments in each call.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _from_json(arguments or "{}", f"the arguments of {function['name']} in {where}")
    read = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return {**read, "id": call["id"]} if isinstance(call.get("id"), str) else read


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is a string that is not valid JSON ({error}).") from error


def _kind(value: Any) -> str:
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
