"""Finds the checks: every function under `checks` that is decorated with `@check`. Imports no torch."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache

import understudy.diagnosis.checks as package
from understudy.diagnosis.check import CHECKS, Check
from understudy.errors import UserError

__all__ = ["all_checks", "checks_named"]


@cache
def all_checks() -> Sequence[Check]:
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{found.name}")
    return tuple(CHECKS)


def checks_named(names: Sequence[str]) -> Sequence[Check]:
    """Those of these names, or all of them without any. Raises `UserError` for one that does not exist."""
    known = {known.name: known for known in all_checks()}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
            raise UserError(f"there is no check {name!r}; {hint}")
    return [known[name] for name in dict.fromkeys(names)] if names else tuple(known.values())
