"""What fields of a recipe must hold together: one small function a rule. Adding one means adding a function."""

# The order of the imports is the order in which violations are reported.
# isort: off
from understudy.recipe.rules import run, model_and_data, objectives, adapters, optimization, strategies
from understudy.recipe.rules.checking import check, check_processes
from understudy.recipe.rules.rule import RULES

__all__ = [
    "RULES",
    "adapters",
    "check",
    "check_processes",
    "model_and_data",
    "objectives",
    "optimization",
    "run",
    "strategies",
]
