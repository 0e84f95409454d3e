"""YAML as YAML 1.2 reads it (`1e-4` is a number, `no` is text), with the line of every key. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

import yaml

from understudy.errors import UserError

__all__ = ["CoreDumper", "parse_scalar", "parse_yaml"]

_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _STR = (_TAG + kind for kind in ("null", "bool", "int", "float", "str"))
_MAP, _SEQ = _TAG + "map", _TAG + "seq"

# The core schema of YAML 1.2 (section 10.3.2): tag, pattern, first characters. The first that matches wins.
_CORE_SCHEMA: tuple[tuple[str, str, str], ...] = (
    (_NULL, r"^(?:~|null|Null|NULL|)$", "~nN"),
    (_BOOL, r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    (_INT, r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        _FLOAT,
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
)

# Aliases can make a small file stand for a huge one.
_MOST_VALUES = 100_000


def _core_resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first_characters in _CORE_SCHEMA:
        for first in [*first_characters, *([""] if tag == _NULL else [])]:
            resolvers.setdefault(first, []).append((tag, re.compile(pattern)))
    return resolvers


class CoreLoader(yaml.SafeLoader):
    """Resolves plain scalars by the core schema of YAML 1.2."""

    yaml_implicit_resolvers = _core_resolvers()


class CoreDumper(yaml.SafeDumper):
    """Quotes exactly the texts that `CoreLoader` would take for something else."""

    yaml_implicit_resolvers = _core_resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Only double quotes keep line breaks of every kind (\n, \x85, \u2028) through PyYAML's emitter and scanner.
        return self.represent_scalar(_STR, data, style=None if data.isprintable() else '"')


CoreDumper.add_representer(str, CoreDumper.represent_str)


def parse_yaml(text: str, file: str) -> tuple[Any, dict[str, int]]:
    """The value of one YAML document, and the line (from 1) of each dotted key in it. Raises `UserError`."""
    try:
        node = yaml.compose(text, Loader=CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(filter(None, (error.context, error.problem)))
        line = mark.line + 1 if mark else None
        raise UserError(f"not valid YAML: {problem}; correct this line.", file=file, line=line) from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UserError("a control character stands in this line; remove it.", file=file, line=line) from error
    except RecursionError as error:
        raise UserError("mappings are nested too deeply to be a recipe.", file=file) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"not valid YAML: {error}", file=file) from error
    if node is None:
        return None, {}
    builder = _Builder(file)
    return builder.build(node, "", frozenset()), builder.lines


def parse_scalar(text: str) -> Any:
    """A plain YAML scalar: a number, true, false, null, else the text itself. Raises `ValueError` for a number that
    Python does not read."""
    for tag, pattern, _ in _CORE_SCHEMA:
        if re.match(pattern, text):
            return _scalar(tag, text)
    return text


def _scalar(tag: str, text: str) -> Any:
    if tag == _NULL:
        return None
    if tag == _STR:
        return text
    if tag not in (_BOOL, _INT, _FLOAT):
        raise ValueError(_meaningless(tag))
    try:
        if tag == _BOOL:
            return {"true": True, "false": False}[text.lower()]
        if tag == _INT:
            return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except (ValueError, KeyError):
        if text.lstrip("+-").isdecimal():  # int() refuses more than 4,300 digits
            raise ValueError(f"it has {len(text):,} digits, too many for a number") from None
        raise ValueError(f"it is no {tag.removeprefix(_TAG)}") from None


def _meaningless(tag: str) -> str:
    return f"the tag {tag.replace(_TAG, '!!')} means nothing in a recipe; remove it"


class _Builder:
    """Turns nodes into values and notes the line of each key."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[str, int] = {}
        self.values = 0

    def build(self, node: yaml.Node, key: str, ancestors: frozenset[int]) -> Any:
        self.values += 1
        if id(node) in ancestors:
            raise self._error(node, "an alias (*) refers to the mapping it stands in; write the value out.")
        if self.values > _MOST_VALUES:
            raise self._error(node, f"this holds more than {_MOST_VALUES} values, too many for a recipe.")
        inside = ancestors | {id(node)}
        if isinstance(node, yaml.CollectionNode) and node.tag not in (_MAP, _SEQ):
            raise self._error(node, f"{_meaningless(node.tag)}.")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, inside)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(child, f"{key}.{i}" if key else str(i), inside) for i, child in enumerate(node.value)]
        try:
            return _scalar(node.tag, node.value)
        except ValueError as error:
            raise self._error(node, f"{node.value[:40]!r} cannot be read: {error}.") from error

    def _item(self, node: yaml.Node, key: str, ancestors: frozenset[int]) -> Any:
        self.lines[key] = node.start_mark.line + 1
        return self.build(node, key, ancestors)

    def _mapping(self, node: yaml.MappingNode, key: str, ancestors: frozenset[int]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                raise self._error(name_node, "a key must be a single word, not a list or a mapping.")
            name = str(name_node.value)
            if name == "<<" and name_node.style is None:
                raise self._error(name_node, "YAML 1.2 has no merge keys (<<); write the keys out.")
            child = f"{key}.{name}" if key else name
            if name in values:
                first = self.lines[child]
                raise self._error(name_node, f"the key `{name}` was given before, in line {first}; remove one of them.")
            self.lines[child] = name_node.start_mark.line + 1
            values[name] = self.build(value_node, child, ancestors)
        return values

    def _error(self, node: yaml.Node, message: str) -> UserError:
        return UserError(message, file=self.file, line=node.start_mark.line + 1)
