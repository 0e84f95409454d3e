"""A rule: what fields of a recipe must hold together, and the list of all of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from understudy.recipe.schema import Recipe

__all__ = ["RULES", "Rule", "Violations", "rule"]

Violations = Iterator[tuple[str, str]]
"""The key and the message of each."""
Rule = Callable[[Recipe], Violations]

RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Has every recipe judged by `function` too."""
    RULES.append(function)
    return function
