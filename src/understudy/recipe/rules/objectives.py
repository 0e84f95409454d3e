"""Rules about distillation. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from understudy.recipe.adapters import Freeze, LlamaAdapter, LoRA, PromptTuning
from understudy.recipe.kinds import unread_fields
from understudy.recipe.objectives import Distillation, Objective
from understudy.recipe.rules.rule import Violations, rule
from understudy.recipe.schema import Recipe
from understudy.recipe.teachers import BaseTeacher, CachedTeacher, OneTeacher, ServerTeacher, SeveralTeachers


@rule
def every_divergence_field_is_read(recipe: Recipe) -> Violations:
    objective = recipe.objective
    if isinstance(objective, Distillation):
        for name in unread_fields(objective):
            if name in objective.model_fields_set:
                yield f"objective.{name}", f"`objective.{name}` means nothing to {objective.divergence}; remove it."


def _divergence(recipe: Recipe) -> str:
    return recipe.objective.divergence if isinstance(recipe.objective, Distillation) else ""


def _named_teachers(objective: Objective) -> Iterator[tuple[str, OneTeacher]]:
    """Each teacher, and the key where it stands."""
    if isinstance(objective, Distillation):
        several = isinstance(objective.teacher, SeveralTeachers)
        for i, teacher in enumerate(objective.teachers):
            yield f"objective.teacher.teachers.{i}" if several else "objective.teacher", teacher


@rule
def each_of_several_teachers_has_a_weight(recipe: Recipe) -> Violations:
    objective = recipe.objective
    if isinstance(objective, Distillation) and isinstance(objective.teacher, SeveralTeachers):
        teachers, weights = objective.teacher.teachers, objective.teacher.weights
        if weights is not None and len(weights) != len(teachers):
            yield (
                "objective.teacher.weights",
                f"`objective.teacher.weights` has {len(weights)} numbers for {len(teachers)} teachers; give one each.",
            )


@rule
def a_base_teaches_without_its_adapter(recipe: Recipe) -> Violations:
    adapter = recipe.adapter
    for key, teacher in _named_teachers(recipe.objective):
        if not isinstance(teacher, BaseTeacher):
            continue
        if adapter is None or isinstance(adapter, Freeze | LlamaAdapter | PromptTuning):
            yield (
                key,
                "the student's base teaches with the adapter switched off, and this recipe has none that can be; add "
                "`adapter: lora`, or name a teacher: `{kind: resident, path: …}`.",
            )
        elif isinstance(adapter, LoRA) and adapter.train:
            yield (
                "adapter.train",
                "embeddings or head that are trained are not those of the base, which is to teach; remove "
                "`adapter.train`, or name a teacher: `{kind: resident, path: …}`.",
            )


@rule
def draws_estimate_forward_kl_alone(recipe: Recipe) -> Violations:
    for key, teacher in _named_teachers(recipe.objective):
        if isinstance(teacher, CachedTeacher) and teacher.targets == "samples" and _divergence(recipe) != "forward_kl":
            yield (
                "objective.divergence" if key == "objective.teacher" else f"{key}.targets",
                f"tokens drawn from the teacher say nothing exact of {_divergence(recipe)}; take forward_kl, or "
                "`targets: top_k`.",
            )


@rule
def hidden_states_have_no_k(recipe: Recipe) -> Violations:
    for key, teacher in _named_teachers(recipe.objective):
        if isinstance(teacher, CachedTeacher) and teacher.targets == "hidden" and teacher.k is not None:
            yield f"{key}.k", f"`{key}.k` means nothing to hidden states; remove it."


@rule
def a_server_speaks_at_temperature_one(recipe: Recipe) -> Violations:
    objective = recipe.objective
    for key, teacher in _named_teachers(objective):
        if isinstance(objective, Distillation) and isinstance(teacher, ServerTeacher) and objective.temperature != 1.0:
            yield (
                "objective.temperature",
                "a server gives the likeliest tokens' probabilities at temperature 1, which cannot be turned into "
                f"others; set `objective.temperature: 1.0`, or let another kind of teacher take the place of `{key}`.",
            )


@rule
def a_server_has_an_address(recipe: Recipe) -> Violations:
    objective = recipe.objective
    if not isinstance(objective, Distillation):
        return
    addresses = [
        (f"{key}.endpoints.{i}", address)
        for key, teacher in _named_teachers(objective)
        if isinstance(teacher, ServerTeacher)
        for i, address in enumerate(teacher.endpoints)
    ]
    if objective.on_policy.endpoint is not None:
        addresses.append(("objective.on_policy.endpoint", objective.on_policy.endpoint))
    for key, address in addresses:
        if problem := _wrong_address(address):
            yield key, f"`{key}` {problem}; write one such as http://127.0.0.1:8000/v1."


def _wrong_address(address: str) -> str | None:
    """What keeps `address` from being that of a server."""
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "is no address"
    if "@" in parts.netloc:
        return "has a name or a password in it, which no recipe should (UNDERSTUDY_TEACHER_API_KEY holds a key)"
    if parts.scheme not in ("http", "https"):
        return f"is {address!r:.100}, which does not begin with http:// or https://"
    if not host or parts.query or parts.fragment or any(c.isspace() or not c.isprintable() for c in address):
        return f"is {address!r:.100}, which is no server's base address"
    return None


@rule
def what_a_student_says_itself_is_in_no_cache(recipe: Recipe) -> Violations:
    objective = recipe.objective
    if isinstance(objective, Distillation) and objective.on_policy_fraction:
        for key, teacher in _named_teachers(objective):
            if isinstance(teacher, CachedTeacher):
                yield (
                    key,
                    "a cache has what the teacher says of the data, not of the student's own answers; set "
                    "`on_policy_fraction: 0`, or name a teacher that can be asked: `kind: resident`.",
                )


@rule
def on_policy_settings_are_read(recipe: Recipe) -> Violations:
    objective = recipe.objective
    if not isinstance(objective, Distillation):
        return
    if not objective.on_policy_fraction and "on_policy" in objective.model_fields_set:
        yield (
            "objective.on_policy",
            "no step trains on the student's own answers; set `objective.on_policy_fraction`, or remove `on_policy`.",
        )
    if objective.on_policy.endpoint is None:
        for name in ("model", "timeout", "retries"):
            if name in objective.on_policy.model_fields_set:
                yield f"objective.on_policy.{name}", f"`{name}` is of an endpoint; set `endpoint`, or remove it."


@rule
def hidden_states_are_those_of_one_model_here(recipe: Recipe) -> Violations:
    objective = recipe.objective
    if not isinstance(objective, Distillation) or objective.hidden_states is None:
        return
    if isinstance(objective.teacher, CachedTeacher | ServerTeacher | SeveralTeachers):
        yield (
            "objective.hidden_states",
            f"a teacher of the kind {objective.teacher.kind} gives no hidden states of layers; name one that runs "
            "here: `kind: resident`, or remove `hidden_states`.",
        )


@rule
def another_tokenizers_teacher_runs_here(recipe: Recipe) -> Violations:
    for key, teacher in _named_teachers(recipe.objective):
        if isinstance(teacher, CachedTeacher | ServerTeacher) and _divergence(recipe) == "uld":
            yield (
                key,
                f"`uld` asks a teacher about its own reading of the data, and a {teacher.kind} has none; name one that "
                "runs here: `kind: resident` or `kind: sharded`, or take another divergence.",
            )


@rule
def two_tokenizers_meet_in_the_data_alone(recipe: Recipe) -> Violations:
    objective = recipe.objective
    if not isinstance(objective, Distillation) or objective.divergence != "uld":
        return
    if objective.on_policy_fraction:
        yield (
            "objective.on_policy_fraction",
            "`uld` compares what two tokenizers make of the data, and the student's own answers are in none; set "
            "`on_policy_fraction: 0`, or take another divergence.",
        )
    if objective.hidden_states is not None:
        yield (
            "objective.hidden_states",
            "hidden states are matched token by token, and with `uld` the two models may have other tokens; remove "
            "`hidden_states`, or take another divergence.",
        )
    if recipe.data.overflow == "split":
        yield (
            "data.overflow",
            "`uld` pairs what two tokenizers make of an example, and each would split it elsewhere; set "
            "`overflow: truncate` or `drop`.",
        )
