"""`key.sub=value` arguments laid over the values of a recipe. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from understudy.errors import UserError
from understudy.recipe.presets import expand_kind, expand_strategy
from understudy.recipe.yaml_text import parse_scalar, parse_yaml

__all__ = ["COMMAND_LINE", "apply_override", "parse_override"]

COMMAND_LINE = "command line"
"""Stands where a file's name would, in errors about an override."""

_EXPANDED: dict[str, Callable[[Any], Any]] = {
    "strategy": expand_strategy,
    "objective": expand_kind,
    "optimizer": expand_kind,
    "schedule": expand_kind,
}
"""Sections that may be a bare string; one is expanded before a key is set inside it."""


def parse_override(argument: str) -> tuple[str, Any]:
    """`training.epochs=1` as `("training.epochs", 1)`. The value is a YAML scalar, or YAML where it opens with a
    bracket, a brace or a quote. Raises `UserError`."""
    key, equals, text = argument.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not key or not all(key.split(".")):
        raise UserError(f"{argument!r} is no override; write key=value, such as training.epochs=1.", file=COMMAND_LINE)
    try:
        value = parse_yaml(text, COMMAND_LINE)[0] if text[:1] in ("[", "{", '"', "'") else parse_scalar(text)
    except (UserError, ValueError) as error:
        reason = error.message if isinstance(error, UserError) else str(error)
        raise UserError(f"the value of {key!r} cannot be read: {reason}", file=COMMAND_LINE) from error
    return key, value


def apply_override(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets the dotted `key` in `values`, making mappings and lists on the way; a number indexes a list, and the number
    just past its end appends. Raises `UserError` where something on the way can hold no key."""
    parts = key.split(".")
    holder: Any = values
    for depth, part in enumerate(parts[:-1]):
        inner = _get(holder, part, parts[:depth])
        if inner is None:
            inner = [] if parts[depth + 1].isdecimal() else {}
        elif depth == 0 and part in _EXPANDED:
            inner = _EXPANDED[part](inner)
        if not isinstance(inner, dict | list):
            path = ".".join(parts[: depth + 1])
            raise UserError(
                f"{key!r} cannot be set, because `{path}` is {inner!r} and holds no keys; give `{path}` as a mapping.",
                file=COMMAND_LINE,
            )
        _set(holder, part, inner, parts[:depth])
        holder = inner
    _set(holder, parts[-1], value, parts[:-1])


def _get(holder: Any, part: str, path: Iterable[str]) -> Any:
    if isinstance(holder, dict):
        return holder.get(part)
    index = _index(holder, part, path)
    return holder[index] if index < len(holder) else None


def _set(holder: Any, part: str, value: Any, path: Iterable[str]) -> None:
    if isinstance(holder, dict):
        holder[part] = value
        return
    index = _index(holder, part, path)
    holder[index : index + 1] = [value]


def _index(holder: list[Any], part: str, path: Iterable[str]) -> int:
    if not part.isdecimal() or int(part) > len(holder):
        where = ".".join(path)
        raise UserError(
            f"`{where}` is a list of {len(holder)}; {part!r} is no index of it, write {where}.0 and so on.",
            file=COMMAND_LINE,
        )
    return int(part)
