"""Finds the formats: every module of this package that holds a `FORMAT`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

import understudy.data.formats as package
from understudy.data.formats.format import Format, Row
from understudy.errors import UserError

__all__ = ["formats", "recognise"]


@cache
def formats() -> Mapping[str, Format]:
    """Formats by name, in the order of their names."""
    modules = (
        importlib.import_module(f"{package.__name__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)
    )
    found = (module.FORMAT for module in modules if hasattr(module, "FORMAT"))
    return {known.name: known for known in sorted(found, key=lambda known: known.name)}


def recognise(row: Row) -> Format:
    """The one format that recognises `row`. Raises `UserError`, without a place, when none does."""
    for known in formats().values():
        if known.recognises(row):
            return known
    present = ", ".join(map(str, row)) or "none"
    raise UserError(
        f"no format is recognised from the columns ({present}); set format to one of {', '.join(formats())}, "
        "and columns where the names differ."
    )
