"""The schema's complaints as sentences a user understands. Imports no torch."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from understudy.errors import Violation
from understudy.recipe.presets import STRATEGY_PRESETS
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap

__all__ = ["nearest", "translate"]

# What each kind of complaint expected; {names} come from the complaint's context.
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping of keys",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "none_required": "null",
    "string_type": "text",
    "string_unicode": "text in valid Unicode",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
    "union_tag_invalid": "{expected_tags}",
}

_MOST_VIOLATIONS = 100
"""More are no help, and finding what each was meant to be takes time."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was most likely meant to be, if any is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def translate(error: ValidationError, values: Mapping[str, Any], source: SourceMap) -> list[Violation]:
    """One violation for each key of `values` that the schema refuses, in the file's order; past `_MOST_VIOLATIONS`,
    one that counts the rest."""
    complaints: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for complaint in error.errors(include_url=False):
        complaints.setdefault(_key(complaint, values), []).append(complaint)
    holders = {key[:end] for key in complaints for end in range(len(key))}
    # A mapping that is neither `auto` nor right is complained about as a whole too; the complaint inside says more.
    keys = [key for key in complaints if key not in holders]
    keys.sort(key=lambda key: source.locate(".".join(key))[1] or 0)
    shown, others = keys[:_MOST_VIOLATIONS], keys[_MOST_VIOLATIONS:]
    violations = [source.violation(".".join(key), _sentence(key, complaints[key], values)) for key in shown]
    if others:
        message = f"{len(others):,} more keys are wrong from here on; correct those above first."
        violations.append(source.violation(".".join(others[0]), message))
    return violations


def _key(details: ErrorDetails, values: Any) -> tuple[str, ...]:
    """The key as it stands in the file: pydantic's location also names union members, which no file holds."""
    key: list[str] = []
    location = details["loc"]
    for i, part in enumerate(location):
        if isinstance(values, Mapping) and part in values:
            values = values[str(part)]
        elif isinstance(values, Sequence) and not isinstance(values, str) and isinstance(part, int):
            values = values[part] if part < len(values) else None
        elif not (details["type"] == "missing" and i == len(location) - 1):
            continue
        key.append(str(part))
    if details["type"] == "union_tag_invalid" and isinstance(values, Mapping):
        key.append("kind")
    return tuple(key)


def _sentence(key: tuple[str, ...], details: list[ErrorDetails], values: Mapping[str, Any]) -> str:
    dotted = _quoted(".".join(key))
    kinds = {detail["type"] for detail in details}
    if "extra_forbidden" in kinds:
        return _unknown_key(key, values)
    if "missing" in kinds:
        return f"{dotted} is missing and has no default; add it."
    if "union_tag_not_found" in kinds:
        tags = [
            tag for section in _sections_at(key, values) for tag in get_args(section.model_fields["kind"].annotation)
        ]
        return f"`{'.'.join(key)}.kind` is missing; it must be {_either(tags)}."
    value = _lookup(key, values)
    if key == ("strategy",) and not isinstance(value, Mapping):
        choices = ["auto", *STRATEGY_PRESETS]
        return _wrong_value(dotted, value, _either([*choices, "a mapping with `kind`"]), choices)
    if isinstance(value, Mapping):
        # Of several union members only one takes mappings; that it is not `auto` as well is no news.
        details = [d for d in details if d["type"] not in ("literal_error", "none_required")] or details
    phrases = list(dict.fromkeys(phrase for detail in details for phrase in _phrases(detail)))
    return _wrong_value(dotted, value, _either(phrases), phrases)


def _phrases(details: ErrorDetails) -> list[str]:
    """What was expected; each of several choices is a phrase of its own."""
    template = _EXPECTED.get(details["type"])
    if template is None:
        return [details["msg"][:1].lower() + details["msg"][1:]]
    context = {name: f"{v:g}" if isinstance(v, float) else v for name, v in details.get("ctx", {}).items()}
    phrase = template.format(**context)
    return re.findall(r"'([^']*)'", phrase) or [phrase]


def _either(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} or {phrases[-1]}"


def _wrong_value(dotted: str, value: Any, expected: str, choices: Iterable[str]) -> str:
    near = nearest(value, choices) if isinstance(value, str) else None
    hint = f"; did you mean {near}?" if near else "."
    return f"{dotted} must be {expected}, not {_shown(value)}{hint}"


def _unknown_key(key: tuple[str, ...], values: Mapping[str, Any]) -> str:
    *parents, name = key
    parent = ".".join(parents)
    known = _known_names(parents, values)
    where = f" in {_quoted(parent)}" if parent else ""
    if near := nearest(name, known):
        return f"unknown key {_quoted(name)}{where}; did you mean `{near}`?"
    own = f"{parent}.{name}"  # of another kind of the same section
    if elsewhere := next((path for path in _all_keys() if path.endswith(f".{name}") and path != own), None):
        return f"unknown key {_quoted(name)}{where}; did you mean `{elsewhere}`?"
    return f"unknown key {_quoted(name)}{where}; known there: {', '.join(known)}."


def _known_names(parents: Sequence[str], values: Any) -> list[str]:
    return list(_sections_at(parents, values)[0].model_fields)


def _sections_at(parents: Sequence[str], values: Any) -> list[type[BaseModel]]:
    """The schema's classes for the mapping at `parents`; only one where its `kind` decides."""
    sections: list[type[BaseModel]] = [Recipe]
    for part in parents:
        values = _lookup([part], values)
        fields = sections[0].model_fields
        if part in fields:
            sections = list(_sections(fields[part].rebuild_annotation()))
            kind = values.get("kind") if isinstance(values, Mapping) else None
            sections = [
                s for s in sections if "kind" in s.model_fields and s.model_fields["kind"].default == kind
            ] or sections
    return sections


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


@functools.cache
def _all_keys() -> tuple[str, ...]:
    return tuple(_keys_of(Recipe, ""))


def _keys_of(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in _sections(field.rebuild_annotation()):
            yield from _keys_of(inner, f"{prefix}{name}.")


def _lookup(key: Iterable[str], values: Any) -> Any:
    for part in key:
        values = values[int(part)] if isinstance(values, Sequence) else values.get(part)
    return values


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _quoted(name: str) -> str:
    return f"`{name}`" if name.isprintable() else repr(name)
