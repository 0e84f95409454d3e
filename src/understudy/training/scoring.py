"""Scores a finished model on a recipe's evaluation data, in one process."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from rapidfuzz.distance import LCSseq
from torch import nn

from understudy.contracts import Batch, LossSum, Objective
from understudy.data.batching import evaluation_batches, prompt_and_answer
from understudy.data.cache import TokenCache
from understudy.data.prepare import prepare_evaluation_data
from understudy.devices.detect import detect_machine
from understudy.devices.device import find_device
from understudy.models.architecture import load_config
from understudy.models.tokenizer import load_tokenizer
from understudy.models.vocabulary_growth import grow_vocabulary
from understudy.objectives.registry import make_objective
from understudy.parallel.world import process_group
from understudy.recipe.environment import ProcessEnvironment, cache_directory
from understudy.recipe.objectives import Distillation
from understudy.recipe.objectives import Objective as AnyObjective
from understudy.recipe.schema import DDP, Model, Parallel, Recipe
from understudy.recipe.source_map import SourceMap
from understudy.recipe.teachers import BaseTeacher
from understudy.strategies.registry import make_strategy
from understudy.training.adapting import adapted_model
from understudy.training.answering import answer_all
from understudy.training.asking import make_asking
from understudy.training.choosing import choose_as_usual
from understudy.training.inference import load_located, quiet_transformers
from understudy.training.job import TeacherPlace
from understudy.training.metrics import evaluation_metrics
from understudy.training.named_model import NamedModel, locate_model
from understudy.training.stopping import StopRequest
from understudy.training.teaching import find_teachers, make_teaching

__all__ = ["Progress", "Scores", "rouge_l", "score_model"]

_WORD = re.compile(r"\w+")


class Progress(Protocol):
    """Told how far long work is."""

    def begin(self, what: str, total: int) -> None:
        """From now on `advance` counts to `total` of `what`."""
        ...

    def advance(self) -> None: ...


@dataclass(frozen=True)
class Scores:
    """Averages over supervised tokens, and over generated answers where there are any."""

    examples: int
    supervised_tokens: int
    loss: float
    """Nats a supervised token: of the recipe's objective, as training evaluates it."""
    perplexity: float
    token_accuracy: float | None
    calibration_error: float | None = None
    """How far the likeliest tokens' probabilities are from how often they are right (expected calibration error)."""
    cross_entropy: float | None = None
    """With a teacher: nats a supervised token."""
    divergence: float | None = None
    """From the teacher: nats a supervised token."""
    teacher_agreement: float | None = None
    """Share of the tokens at which the teacher and the model think the same the likeliest."""
    samples: int = 0
    """Answers generated."""
    exact_match: float | None = None
    """Share of the answers that are the reference, word for word."""
    rouge_l: float | None = None
    """Mean ROUGE-L F1 of the answers (Lin, 2004)."""


def score_model(
    named: str,
    recipe: Recipe,
    sources: SourceMap,
    *,
    samples: int | None,
    max_new_tokens: int,
    report: Callable[[str], None],
    progress: Progress,
    base: str | None = None,
) -> Scores:
    """Loss as training's own evaluation computes it, from the same tokens, batches and objective; and greedy answers to
    the first `samples` prompts of the set (the recipe's `evaluation.samples` when None).

    The model, or the adapter and its base (as `locate_model` finds them), takes the place of the recipe's, with its own
    tokenizer. Raises `UserError` when there is no such model or the recipe has no evaluation data. No process group may
    exist yet.
    """
    quiet_transformers()
    if recipe.data.eval is None and not recipe.data.eval_fraction:
        raise sources.error(
            "data",
            "this recipe has no evaluation data; add `data.eval`, or take part of the training data with "
            "data.eval_fraction=0.05 on the command line.",
        )
    found = locate_model(named, report, base)
    weights = _grown(found)
    evaluated = recipe.model_copy(
        update={
            "model": Model(path=str(weights), attention=recipe.model.attention),
            "adapter": None,
            "quantization": None,
            "strategy": DDP(),
            "parallel": Parallel(),
            "objective": _judged_by(recipe.objective, found, sources),
        }
    )
    resolved = choose_as_usual(evaluated, detect_machine(), 1).recipe
    cache = prepare_evaluation_data(
        resolved,
        sources,
        tokenizer_dir=found.tokenizer,
        vocab_size=load_config(weights, resolved.model).get_text_config().vocab_size,
        cache_dir=cache_directory(),
        report=report,
    )
    assert cache is not None, "the recipe has evaluation data"
    teachers = _teachers(resolved, sources, found, weights, cache, report)
    scores = _loss(resolved, weights, found.adapter, teachers, cache, progress)
    count = min(recipe.evaluation.samples if samples is None else samples, len(cache))
    return _with_answers(scores, found, resolved, cache, count, max_new_tokens, progress) if count else scores


def _judged_by(objective: AnyObjective, found: NamedModel, sources: SourceMap) -> AnyObjective:
    """The recipe's objective, without what belongs to training alone."""
    if not isinstance(objective, Distillation):
        return objective
    if found.adapter is None and any(isinstance(teacher, BaseTeacher) for teacher in objective.teachers):
        raise sources.error(
            "objective.teacher",
            f"the teacher is the base of an adapter, and {found.name} is a whole model; score the adapter, or say "
            "objective=causal_lm on the command line.",
        )
    return objective.model_copy(update={"hidden_states": None, "on_policy_fraction": 0.0})


def _teachers(
    recipe: Recipe,
    sources: SourceMap,
    found: NamedModel,
    weights: Path,
    cache: TokenCache,
    report: Callable[[str], None],
) -> tuple[TeacherPlace, ...]:
    if not isinstance(recipe.objective, Distillation):
        return ()
    student = adapted_model(recipe, weights, found.adapter).model
    tokenizer = load_tokenizer(found.tokenizer, recipe.data.chat_template)
    return find_teachers(recipe, sources, student, tokenizer, None, cache, report)


def _grown(found: NamedModel) -> Path:
    """The directory of the whole model, with the rows that the adapter's new tokens need."""
    base = found.base
    if base is None or base.reference is None or not base.reference.new_tokens:
        return found.weights
    return grow_vocabulary(
        found.weights, Model(path=str(found.weights)), found.tokenizer, find_device(), cache=cache_directory()
    )


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, case aside; 1 where both have no word, 0 where one has none."""
    said, expected = (_WORD.findall(part.casefold()) for part in (text, reference))
    if not said or not expected:
        return float(said == expected)
    return 2 * LCSseq.similarity(said, expected) / (len(said) + len(expected))


def _loss(
    recipe: Recipe,
    weights: Path,
    adapter: Path | None,
    teachers: Sequence[TeacherPlace],
    cache: TokenCache,
    progress: Progress,
) -> Scores:
    """Under the strategy of a single process, so that precision, packing and sums are training's own."""
    assert recipe.training.micro_batch_tokens != "auto", "the recipe must be resolved first"
    device = find_device()
    torch_device = device.torch_device(0)
    batches = evaluation_batches(
        cache,
        micro_batch_tokens=recipe.training.micro_batch_tokens,
        rank=0,
        world_size=1,
        max_batches=recipe.evaluation.max_batches,
    )
    with tempfile.TemporaryDirectory(prefix="understudy-") as private:
        alone = ProcessEnvironment(0, 1, 0, 1, f"file://{private}/rendezvous")
        with process_group(alone, torch_device, device.backend) as world:
            adapted = adapted_model(recipe, weights, adapter)
            strategy = make_strategy(recipe, torch_device, world)
            # A strategy owns an optimizer; this one holds no state until it steps.
            strategy.build(lambda: adapted.model, lambda named: torch.optim.SGD([weight for _, weight in named]))
            strategy.load_state(adapted.read)
            teaching = make_teaching(recipe, teachers, adapted.model, strategy, torch_device, world)
            if (asking := make_asking(teaching, StopRequest())) is not None:
                batches = asking.answered(batches)
            progress.begin("evaluating micro-batches", len(batches))
            total = strategy.evaluate(batches, _Watched(make_objective(recipe.objective, teaching), progress))
    metrics = evaluation_metrics(total)
    return Scores(
        examples=sum(len(batch.document_offsets) - 1 for batch in batches),
        supervised_tokens=int(total.num_tokens),
        loss=metrics["eval_loss"],
        perplexity=metrics["eval_perplexity"],
        token_accuracy=metrics.get("eval_token_accuracy"),
        calibration_error=metrics.get("eval_calibration_error"),
        cross_entropy=metrics.get("eval_cross_entropy"),
        divergence=metrics.get("eval_divergence"),
        teacher_agreement=metrics.get("eval_teacher_agreement"),
    )


@dataclass(frozen=True)
class _Watched:
    """An objective that says when it is done with a batch."""

    objective: Objective
    progress: Progress

    def prepare(self, batch: Batch) -> Batch:
        return self.objective.prepare(batch)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        result = self.objective.loss(model, batch)
        self.progress.advance()
        return result


def _with_answers(
    scores: Scores,
    found: NamedModel,
    recipe: Recipe,
    cache: TokenCache,
    count: int,
    max_new_tokens: int,
    progress: Progress,
) -> Scores:
    assert recipe.training.micro_batch_tokens != "auto", "the recipe must be resolved first"
    loaded = load_located(found)
    pairs = [tuple(part.tolist() for part in prompt_and_answer(cache, i)) for i in range(count)]
    prompts = [prompt for prompt, _ in pairs]
    reference_ends = {answer[-1] for _, answer in pairs if answer} & set(loaded.tokenizer.all_special_ids)
    answers = answer_all(
        loaded.network,
        loaded.tokenizer,
        prompts,
        [loaded.room(prompt, max_new_tokens) for prompt in prompts],
        ends=loaded.ends | reference_ends,
        # Padding would stand between an adapter's vectors and the text: then each prompt runs alone.
        batch_tokens=1 if loaded.vectors else recipe.training.micro_batch_tokens,
    )
    progress.begin("generating answers", count)
    matches, overlaps = 0, 0.0
    for i, tokens in answers:
        text, reference = (
            loaded.tokenizer.decode(part, skip_special_tokens=True).strip() for part in (tokens, pairs[i][1])
        )
        matches += text == reference
        overlaps += rouge_l(text, reference)
        progress.advance()
    return replace(scores, samples=count, exact_match=matches / count, rouge_l=overlaps / count)
