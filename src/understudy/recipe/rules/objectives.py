"""Rules about distillation. Imports no torch."""

from __future__ import annotations

from understudy.recipe.adapters import Freeze, LlamaAdapter, LoRA, PromptTuning
from understudy.recipe.kinds import unread_fields
from understudy.recipe.objectives import BaseTeacher, CachedTeacher, Distillation
from understudy.recipe.rules.rule import Violations, rule
from understudy.recipe.schema import Recipe


@rule
def every_divergence_field_is_read(recipe: Recipe) -> Violations:
    objective = recipe.objective
    if isinstance(objective, Distillation):
        for name in unread_fields(objective):
            if name in objective.model_fields_set:
                yield f"objective.{name}", f"`objective.{name}` means nothing to {objective.divergence}; remove it."


@rule
def a_base_teaches_without_its_adapter(recipe: Recipe) -> Violations:
    objective, adapter = recipe.objective, recipe.adapter
    if not isinstance(objective, Distillation) or not isinstance(objective.teacher, BaseTeacher):
        return
    if adapter is None or isinstance(adapter, Freeze | LlamaAdapter | PromptTuning):
        yield (
            "objective.teacher",
            "the student's base teaches with the adapter switched off, and this recipe has none that can be; add "
            "`adapter: lora`, or name a teacher: `{kind: resident, path: …}`.",
        )
    elif isinstance(adapter, LoRA) and adapter.train:
        yield (
            "adapter.train",
            "embeddings or head that are trained are not those of the base, which is to teach; remove `adapter.train`, "
            "or name a teacher: `{kind: resident, path: …}`.",
        )


@rule
def draws_estimate_forward_kl_alone(recipe: Recipe) -> Violations:
    objective = recipe.objective
    if (
        isinstance(objective, Distillation)
        and isinstance(objective.teacher, CachedTeacher)
        and objective.teacher.targets == "samples"
        and objective.divergence != "forward_kl"
    ):
        yield (
            "objective.divergence",
            f"tokens drawn from the teacher say nothing exact of {objective.divergence}; take forward_kl, or "
            "`targets: top_k`.",
        )


@rule
def hidden_states_have_no_k(recipe: Recipe) -> Violations:
    objective = recipe.objective
    if isinstance(objective, Distillation) and isinstance(objective.teacher, CachedTeacher):
        teacher = objective.teacher
        if teacher.targets == "hidden" and teacher.k is not None:
            yield "objective.teacher.k", "`objective.teacher.k` means nothing to hidden states; remove it."
