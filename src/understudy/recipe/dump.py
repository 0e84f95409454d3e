"""A recipe as YAML, the form a run directory keeps. Imports no torch."""

from __future__ import annotations

import yaml

from understudy.recipe.kinds import unread_fields
from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import Optimizer, Recipe, Schedule
from understudy.recipe.yaml_text import CoreDumper

__all__ = ["dump_recipe"]


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every default written out, that `load_recipe` reads back to an equal recipe.

    A field that has no effect, such as `epochs` beside `max_steps`, is left out: written down, it would be refused.
    A `model.trust_remote_code` that was granted is written for the record, and has to be granted again.
    """
    values = recipe.model_dump()
    sections: list[tuple[str, Optimizer | Schedule | Distillation]] = [
        ("optimizer", recipe.optimizer),
        ("schedule", recipe.schedule),
    ]
    if isinstance(recipe.objective, Distillation):
        sections.append(("objective", recipe.objective))
    for name, section in sections:
        for field in unread_fields(section):
            if field not in section.model_fields_set:
                del values[name][field]
    if recipe.training.max_steps is not None and "epochs" not in recipe.training.model_fields_set:
        del values["training"]["epochs"]
    return yaml.dump(values, Dumper=CoreDumper, sort_keys=False, allow_unicode=True, width=120)
