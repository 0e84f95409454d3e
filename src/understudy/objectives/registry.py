"""The objective behind a recipe's `objective.kind`."""

from __future__ import annotations

from understudy.contracts import Objective
from understudy.objectives.causal_lm import CausalLMObjective
from understudy.objectives.distillation import DistillationObjective
from understudy.objectives.teachers.teacher import Teaching
from understudy.recipe import objectives as recipe

__all__ = ["make_objective"]


def make_objective(section: recipe.Objective, teaching: Teaching | None = None) -> Objective:
    """`teaching` is who teaches, where the objective has a teacher."""
    if isinstance(section, recipe.CausalLM):
        return CausalLMObjective()
    assert teaching is not None, "distillation has a teacher"
    return DistillationObjective(section, teaching.teacher, teaching.shared_classes)
