"""What a run says of itself before it begins."""

from __future__ import annotations

from understudy.plan.teaching import TeacherCost, cache_advice, teacher_share
from understudy.recipe.schema import DDP, FSDP, DeepSpeed
from understudy.training.prepare import Prepared

__all__ = ["opening_lines", "strategy_name"]


def opening_lines(prepared: Prepared) -> str:
    """What is about to run."""
    recipe = prepared.job.recipe
    processes, nodes = recipe.cluster.world_size, recipe.cluster.nodes
    evaluation = f", {prepared.evaluation_examples:,} for evaluation" if prepared.evaluation_examples else ""
    return "\n".join(
        [
            f"{recipe.name}: {prepared.job.sources.file} → {recipe.output_dir}",
            f"strategy {strategy_name(recipe.strategy)}, precision {recipe.training.precision}, {processes} "
            + ("process" if processes == 1 else "processes")
            + (f" on {nodes} hosts" if nodes > 1 else ""),
            f"model {prepared.model_type}, {prepared.parameters:,} parameters{_trained_part(prepared)}",
            *_teacher_lines(prepared),
            f"data {prepared.examples:,} examples an epoch{evaluation}; {prepared.steps:,} steps of "
            f"{recipe.training.global_batch_size} examples",
            *([f"going on from {resume} (step {prepared.resumed_step:,})"] if (resume := prepared.job.resume) else []),
        ]
    )


def _teacher_lines(prepared: Prepared) -> list[str]:
    recipe, count = prepared.job.recipe, sum(place.parameters for place in prepared.job.teachers)
    if not count:
        return []
    cost = TeacherCost(
        teacher_parameters=count,
        student_parameters=prepared.parameters,
        passes=prepared.steps * recipe.training.global_batch_size / prepared.examples,
        supervised_tokens=prepared.supervised_tokens,
        vocabulary_size=max(place.shared_classes for place in prepared.job.teachers),
    )
    share = teacher_share(cost, adapted=recipe.adapter is not None)
    advice = cache_advice(recipe, cost)
    line = f"teacher {count:,} parameters, {share:.0%} of the computation"
    return [line if advice is None else f"{line}, {advice}"]


def _trained_part(prepared: Prepared) -> str:
    if (adapter := prepared.job.recipe.adapter) is None:
        return ""
    share = prepared.trained / prepared.parameters
    return f", of which {adapter.kind} trains {prepared.trained:,} ({share:.2%})"


def strategy_name(strategy: DDP | FSDP | DeepSpeed | str) -> str:
    """Its kind and what in it is not the default."""
    assert not isinstance(strategy, str), "the recipe must be resolved first"
    chosen = strategy.model_dump(exclude={"kind"}, exclude_defaults=True)
    return " ".join([strategy.kind, *(f"{name}={value}" for name, value in chosen.items())])
