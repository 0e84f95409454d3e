"""The objective behind a recipe's `objective.kind`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from understudy.contracts import Objective
from understudy.objectives.causal_lm import CausalLMObjective
from understudy.recipe import schema

__all__ = ["OBJECTIVES", "make_objective"]

OBJECTIVES: Mapping[str, Callable[[schema.CausalLM], Objective]] = MappingProxyType(
    {"causal_lm": lambda section: CausalLMObjective()}
)
"""Kind: what builds the objective from its section of the recipe."""


def make_objective(section: schema.CausalLM) -> Objective:
    return OBJECTIVES[section.kind](section)
