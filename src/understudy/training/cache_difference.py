"""By how much a cache of the likeliest tokens differs from the teacher itself, for the student of a recipe.

The divergence on k tokens and all others as one is never more than that on all of them, and how much less depends on
what the student thinks of the others. It is measured as training begins, when the student knows least of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from understudy.contracts import Batch, LossSum
from understudy.data.prepare import PreparedData
from understudy.models.language_model import LanguageModel
from understudy.objectives.distillation_loss import DistillationLoss
from understudy.objectives.divergences.settings import DivergenceSettings
from understudy.objectives.targets import DenseTargets, Targets, TopKTargets
from understudy.objectives.teachers.cache_contents import TopK, TopKRows
from understudy.objectives.teachers.caching import keep
from understudy.objectives.teachers.teacher import supervised_positions
from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.strategies.precision import precision_of
from understudy.strategies.teaching import hold
from understudy.training.adapting import adapted_model, find_adapter
from understudy.training.job import Job
from understudy.training.prepare import grown_model, materialized_model, quantized_model

__all__ = ["SAMPLED_EXAMPLES", "Difference", "StudentPlace", "find_student", "measure_difference", "open_student"]

SAMPLED_EXAMPLES = 32


class StudentPlace(NamedTuple):
    model: Path
    """Its directory, as it is loaded."""
    adapter: Path | None


class Difference(NamedTuple):
    """In nats a supervised token, of the recipe's divergence."""

    examples: int
    """That were looked at."""
    exact: float
    cached: float
    largest: float
    """Most by which the two differ in one example."""

    def in_words(self) -> str:
        return (
            f"the student's divergence as training begins: {self.exact:.4f} nats a token from the teacher, "
            f"{self.cached:.4f} from the cache; at most {self.largest:.4f} apart in each of {self.examples} examples"
        )


def find_student(
    recipe: Recipe, sources: SourceMap, tokenizer: Path, data: PreparedData, report: Callable[[str], None]
) -> StudentPlace:
    """The student of `recipe`, which is resolved, as training would begin with it. Raises `UserError`."""
    with sources.placing("model.path" if recipe.model.path else "model"):
        original = materialized_model(recipe, tokenizer, lambda vocabulary: data, report)
        directory = grown_model(recipe, quantized_model(recipe, original, report), tokenizer)
    with sources.placing("adapter"):
        return StudentPlace(directory, find_adapter(recipe, directory, original))


def open_student(job: Job, device: torch.device) -> LanguageModel:
    """It, with its weights on `device`."""
    adapted = adapted_model(job.recipe, job.model_directory, job.adapter_directory)
    hold(adapted.model, adapted.read, device, precision_of(job.recipe.training.precision).compute)
    return adapted.model.eval()


@torch.no_grad()
def measure_difference(
    objective: Distillation, student: LanguageModel, teacher: LanguageModel, contents: TopK, batches: Sequence[Batch]
) -> Difference:
    """`batches` hold an example each, with something supervised, on the device of both models."""
    exact, cached, tokens, largest = 0.0, 0.0, 0, 0.0
    for batch in batches:
        hidden = teacher(batch, hidden_at=supervised_positions(batch)).last
        rows = keep(contents, hidden, teacher.head, []).rows
        assert isinstance(rows, TopKRows), "the likeliest are kept"
        device = hidden.device
        kept = TopKTargets(rows.ids.to(device), rows.log_probs.to(device), rows.tail.to(device))
        whole = _divergence(objective, student, batch, DenseTargets.through(hidden, teacher.head), contents)
        from_cache = _divergence(objective, student, batch, kept, contents)
        exact, cached, tokens = exact + whole, cached + from_cache, tokens + len(hidden)
        largest = max(largest, abs(whole - from_cache) / len(hidden))
    return Difference(len(batches), exact / tokens, cached / tokens, largest)


def _divergence(
    objective: Distillation, student: LanguageModel, batch: Batch, targets: Targets, contents: TopK
) -> float:
    """Nats, summed over supervised tokens."""
    loss = DistillationLoss(
        objective.divergence,
        batch.labels[supervised_positions(batch)],
        targets,
        settings=DivergenceSettings(alpha=objective.alpha, beta=objective.beta),
        temperature=objective.temperature,
        shared_classes=contents.vocabulary_size,
    )
    total: LossSum = student(batch, loss)
    return float(total.metrics["divergence"])
