"""From a file and overrides to a checked, frozen recipe. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from understudy.errors import RecipeError, UserError, Violation
from understudy.recipe.json_text import parse_json
from understudy.recipe.overrides import apply_override, parse_override
from understudy.recipe.rules import check
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.recipe.text_file import read_text
from understudy.recipe.toml_text import parse_toml
from understudy.recipe.translation import translate
from understudy.recipe.yaml_text import parse_yaml

__all__ = ["load_recipe"]

_PARSERS: dict[str, Callable[[str, str], tuple[Any, dict[str, int]]]] = {".json": parse_json, ".toml": parse_toml}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, SourceMap]:
    """The recipe in `path` (YAML, JSON or TOML by its suffix) with `key.sub=value` overrides laid over it.

    Paths inside are relative to the working directory; one that stands in the file, does not exist there and does
    exist beside the recipe file is taken from there. `name` defaults to the file's stem, `output_dir` to runs/<name>.
    Raises `UserError` where the file cannot be read, else `RecipeError` with every violation at once.
    """
    text = read_text(path, "recipe")
    values, lines = _PARSERS.get(path.suffix.lower(), parse_yaml)(text, str(path))
    if not isinstance(values, dict):
        raise UserError("a recipe is a mapping of keys; begin with `model:`, `data:`.", file=path, line=1)
    _resolve_beside(values, path.parent)
    overridden = _apply_overrides(values, lines, overrides)
    source = SourceMap(str(path), lines, frozenset(overridden))
    values.setdefault("name", path.stem)
    values.setdefault("output_dir", f"runs/{values['name']}")
    if isinstance(values["output_dir"], str):
        values["output_dir"] = os.path.expanduser(values["output_dir"])  # noqa: PTH111  # leaves an unknown ~user alone
    if unwritable := [source.violation(key, message) for key, message in _unwritable_text(values, "")]:
        raise RecipeError(unwritable)
    violations = list(_refuse_remote_code(values, source))
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError([*violations, *translate(error, values, source)]) from error
    check(recipe, source, violations)
    return recipe, source


def _apply_overrides(values: dict[str, Any], lines: dict[str, int], overrides: Sequence[str]) -> list[str]:
    keys = []
    for argument in overrides:
        key, value = parse_override(argument)
        apply_override(values, key, value)
        for known in [known for known in lines if known == key or known.startswith(f"{key}.")]:
            del lines[known]
        keys.append(key)
    _let_command_line_set_the_length(values, keys)
    return keys


def _let_command_line_set_the_length(values: dict[str, Any], keys: Sequence[str]) -> None:
    """`training.max_steps=10` replaces the file's epochs, and the other way round; in one place they contradict."""
    training = values.get("training")
    pair = ("max_steps", "epochs")
    for given, other in (pair, pair[::-1]):
        if f"training.{given}" in keys and f"training.{other}" not in keys and isinstance(training, dict):
            training.pop(other, None)


def _unwritable_text(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Texts that neither a file's name nor a UTF-8 file can hold, as escapes and the command line can give them."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _unwritable_text(name, f"{key}.{name}" if key else name)
            yield from _unwritable_text(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _unwritable_text(inner, f"{key}.{number}")
    elif isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        yield key, f"{value[:40]!r} holds a NUL or half a surrogate pair, which is no character; remove it."


def _refuse_remote_code(values: dict[str, Any], source: SourceMap) -> Iterator[Violation]:
    key = "model.trust_remote_code"
    model = values.get("model")
    if isinstance(model, dict) and model.get("trust_remote_code") is True and source.locate(key)[0] == source.file:
        yield source.violation(
            key, f"`{key}` is not honoured from a file; if you trust that code, say {key}=true on the command line."
        )


def _resolve_beside(values: dict[str, Any], directory: Path) -> None:
    """Rewrites relative paths that exist beside the recipe file and not from the working directory."""
    for holder, name in _path_fields(values):
        written = holder.get(name)
        if isinstance(written, str) and written and not _exists(Path(), written) and _exists(directory, written):
            holder[name] = str(directory / written)


def _path_fields(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    sections = {name: section for name, section in values.items() if isinstance(section, dict)}
    for section, name in (
        ("model", "path"),
        ("model", "tokenizer"),
        ("data", "chat_template"),
        ("strategy", "config"),
        ("adapter", "path"),
    ):
        if section in sections:
            yield sections[section], name
    data = sections.get("data", {})
    for part in ("train", "eval"):
        sources = data.get(part)
        for source in sources if isinstance(sources, list) else ():
            if isinstance(source, dict):
                yield source, "path"


def _exists(directory: Path, written: str) -> bool:
    """Whether a path or glob names something; text that no file system takes as a path names nothing."""
    try:
        if (directory / written).exists():
            return True
        is_glob = any(mark in written for mark in "*?[") and not Path(written).is_absolute()
        return is_glob and next(iter(directory.glob(written)), None) is not None
    except (OSError, ValueError):
        return False
