"""Everything slow or refusable, done in one process before any process group exists (P7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from understudy.checkpoint.export import stored_spec
from understudy.checkpoint.places import MODEL
from understudy.checkpoint.safetensors_writer import spec_bytes
from understudy.contracts import TensorSpec
from understudy.data.cache import TokenCache
from understudy.data.prepare import prepare_data
from understudy.devices.device import find_device
from understudy.errors import UserError
from understudy.models.build import make_language_model, open_weights
from understudy.models.initialization import materialize_random
from understudy.models.language_model import LanguageModel
from understudy.models.source import model_directory, tokenizer_directory
from understudy.models.tokenizer import load_tokenizer
from understudy.optim.optimizers.registry import make_optimizer
from understudy.optim.state import kept_state
from understudy.recipe.environment import cache_directory
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.strategies.precision import precision_of
from understudy.strategies.registry import prepare_strategy
from understudy.training.companions import make_companions
from understudy.training.job import Job
from understudy.training.worker import training_data

__all__ = ["Prepared", "materialized_model", "prepare_job", "require_fit"]


@dataclass(frozen=True)
class Prepared:
    """A job, and what its first lines on the console say."""

    job: Job
    model_type: str
    parameters: int
    model_bytes: int
    """Of the final model's weights on disk."""
    checkpoint_bytes: int
    """Of a checkpoint's weights and optimizer state."""
    data_digest: str
    """Of the training examples."""
    examples: int
    """Of an epoch."""
    evaluation_examples: int
    steps: int
    resumed_step: int = 0
    """Steps that the checkpoint to go on from has done."""


def prepare_job(recipe: Recipe, sources: SourceMap, report: Callable[[str], None]) -> Prepared:
    """Finds or builds the model and its data, and refuses what cannot be trained. `recipe` is resolved.

    Repeated calls find everything in the cache; concurrent ones wait for the one that builds. `report` is given a line
    about anything that takes time. Raises `UserError` at the recipe's line. No process group may exist yet.
    """
    with sources.placing("model.tokenizer" if recipe.model.tokenizer else "model.path"):
        tokenizer = tokenizer_directory(recipe.model)
    with sources.placing("model.path" if recipe.model.path else "model"):
        directory = materialized_model(recipe)
        model = make_language_model(directory, recipe.model, find_device())
        open_weights(directory, model)
    config = model.config.get_text_config()
    with sources.placing("optimizer"):
        checkpoint_bytes = _checkpoint_bytes(model, recipe)
    with sources.placing("strategy"):
        prepare_strategy(recipe, report)
    data = prepare_data(
        recipe,
        sources,
        tokenizer_dir=tokenizer,
        vocab_size=config.vocab_size,
        cache_dir=cache_directory(),
        report=report,
    )
    train = TokenCache.open(data.train)
    evaluation = None if data.evaluation is None else TokenCache.open(data.evaluation)
    _refuse_longer_documents(model.document_limit, [train, *([evaluation] if evaluation else [])], sources)
    _read_companions(recipe, sources, directory, tokenizer, train)
    steps = training_data(recipe, train, config.hidden_size, rank=0, world_size=1)
    return Prepared(
        job=Job(recipe, sources, Path(recipe.output_dir), directory, tokenizer, data.train, data.evaluation),
        model_type=model.config.model_type,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        model_bytes=_model_bytes(model, precision_of(recipe.training.precision).compute),
        checkpoint_bytes=checkpoint_bytes,
        data_digest=train.digest,
        examples=steps.examples_per_epoch,
        evaluation_examples=0 if evaluation is None else len(evaluation),
        steps=steps.total_steps,
    )


def require_fit(recipe: Recipe, sources: SourceMap, checkpoint: Path, model_directory: Path) -> None:
    """Raises `UserError` when the weights in `checkpoint` are not those of the recipe's model."""
    model = make_language_model(model_directory, recipe.model, find_device())
    try:
        open_weights(checkpoint / MODEL, model)
    except UserError as error:
        raise sources.error("checkpoint.resume", f"{checkpoint} is of another model: {error.message}") from error


def _read_companions(
    recipe: Recipe, sources: SourceMap, directory: Path, tokenizer_directory: Path, train: TokenCache
) -> None:
    """Reads what the processes will read again, so that damage there is refused before the run begins."""
    trust = recipe.model.trust_remote_code
    with sources.placing("model.tokenizer" if recipe.model.tokenizer else "model.path"):
        tokenizer = load_tokenizer(tokenizer_directory, recipe.data.chat_template, trust_remote_code=trust)
        make_companions(directory, recipe.model, tokenizer, train)


def materialized_model(recipe: Recipe) -> Path:
    """The directory of the recipe's model, with its weights; random ones are made, once."""
    if recipe.model.init == "random":
        return materialize_random(recipe.model, recipe.training.seed, cache_directory())
    return model_directory(recipe.model)


def _model_bytes(model: LanguageModel, dtype: torch.dtype) -> int:
    specs = (TensorSpec(tuple(parameter.shape), parameter.dtype) for parameter in model.parameters())
    return sum(spec_bytes(stored_spec(spec, dtype)) for spec in specs)


def _checkpoint_bytes(model: LanguageModel, recipe: Recipe) -> int:
    """Of master weights, and of optimizer state if all of them are trained. What an optimizer keeps of a parameter is
    asked of the optimizer itself, on a small one."""
    dtype = precision_of(recipe.training.precision).weights
    matrix = torch.nn.Parameter(torch.ones(64, 128, dtype=dtype))
    optimizer = make_optimizer(recipe.optimizer, [("layers.0.mlp.weight", matrix)], fused=False)
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    kept = sum(value.nbytes for value in kept_state(optimizer, matrix).values()) / matrix.numel()
    return _model_bytes(model, dtype) + round(kept * sum(parameter.numel() for parameter in model.parameters()))


def _refuse_longer_documents(limit: int | None, caches: Sequence[TokenCache], sources: SourceMap) -> None:
    longest = max(int(cache.lengths.max()) for cache in caches)
    if limit is not None and longest > limit:
        raise sources.error(
            "data.max_length",
            f"the longest example has {longest:,} tokens, but the model has positions for {limit:,}; set "
            f"data.max_length to {limit} or less.",
        )
