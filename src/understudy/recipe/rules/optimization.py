"""Rules about length, optimizer and schedule. Imports no torch."""

from __future__ import annotations

from understudy.recipe.kinds import unread_fields
from understudy.recipe.rules.rule import Violations, rule
from understudy.recipe.schema import Recipe


@rule
def a_run_has_one_length(recipe: Recipe) -> Violations:
    if recipe.training.max_steps is not None and "epochs" in recipe.training.model_fields_set:
        yield (
            "training.max_steps",
            "`training.max_steps` and `training.epochs` contradict each other; remove one of them.",
        )


@rule
def every_optimizer_field_is_read(recipe: Recipe) -> Violations:
    for name in unread_fields(recipe.optimizer):
        if name in recipe.optimizer.model_fields_set:
            yield f"optimizer.{name}", f"`optimizer.{name}` means nothing to {recipe.optimizer.kind}; remove it."


@rule
def every_schedule_field_is_read(recipe: Recipe) -> Violations:
    for name in unread_fields(recipe.schedule):
        if name in recipe.schedule.model_fields_set:
            yield (
                f"schedule.{name}",
                f"`schedule.{name}` means nothing to the {recipe.schedule.kind} schedule; remove it.",
            )


@rule
def adamw_bf16_keeps_bf16_weights(recipe: Recipe) -> Violations:
    if recipe.optimizer.kind == "adamw_bf16" and recipe.training.precision != "pure_bf16":
        yield (
            "optimizer.kind",
            f"adamw_bf16 keeps weights in bf16 but `training.precision` is {recipe.training.precision}; "
            "set it to pure_bf16 or take adamw.",
        )


@rule
def bf16_moments_follow_their_gradients(recipe: Recipe) -> Violations:
    # Near a beta of 1 - 2^-9, half a unit of bf16, an average that should fall rounds back to where it was.
    second = recipe.optimizer.betas[1]
    if recipe.optimizer.kind == "adamw_bf16" and second > 0.99:
        yield (
            "optimizer.betas",
            f"a bf16 second moment cannot follow gradients that shrink with a second beta of {second}; "
            "take at most 0.99, or adamw.",
        )
