"""Everything slow or refusable, done in one process before any process group exists (P7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from understudy.checkpoint.export import stored_spec
from understudy.checkpoint.places import MODEL
from understudy.checkpoint.safetensors_writer import spec_bytes
from understudy.contracts import TensorSpec
from understudy.data.cache import TokenCache
from understudy.data.prepare import PreparedData, prepare_data
from understudy.devices.device import find_device
from understudy.errors import UserError
from understudy.models.adapters.directory import is_adapter, read_base
from understudy.models.adapters.new_tokens import require_trained_vocabulary
from understudy.models.architecture import load_config
from understudy.models.identity import model_digest
from understudy.models.initialization import materialize_random
from understudy.models.names import canonical_name
from understudy.models.quantization.materialize import materialize_quantized
from understudy.models.source import model_directory, tokenizer_directory
from understudy.models.tokenizer import load_tokenizer, prepared_tokenizer
from understudy.models.vocabulary_growth import grow_vocabulary
from understudy.optim.optimizers.registry import make_optimizer
from understudy.optim.state import kept_state
from understudy.recipe.environment import cache_directory
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.strategies.precision import precision_of
from understudy.strategies.registry import prepare_strategy
from understudy.training.adapting import Adapted, adapted_model, find_adapter, saved_dtype
from understudy.training.checkpoint_setup import run_model
from understudy.training.companions import make_companions
from understudy.training.existing_adapter import require_same_adapter, require_same_base
from understudy.training.hidden_states import map_shapes
from understudy.training.job import Job
from understudy.training.pruning import pruned_model
from understudy.training.run import training_data
from understudy.training.teaching import find_teachers

__all__ = ["Prepared", "data_preparer", "grown_model", "materialized_model", "prepare_job", "require_fit"]


@dataclass(frozen=True)
class Prepared:
    """A job, and what its first lines on the console say."""

    job: Job
    model_type: str
    parameters: int
    trained: int
    """Of the parameters."""
    model_bytes: int
    """Of the final model's weights on disk."""
    checkpoint_bytes: int
    """Of a checkpoint's weights and optimizer state."""
    data_digest: str
    """Of the training examples."""
    examples: int
    """Of an epoch."""
    evaluation_examples: int
    supervised_tokens: int
    """Of training and evaluation data."""
    steps: int
    resumed_step: int = 0
    """Steps that the checkpoint to go on from has done."""


def prepare_job(recipe: Recipe, sources: SourceMap, report: Callable[[str], None]) -> Prepared:
    """Finds or builds the model and its data, and refuses what cannot be trained. `recipe` is resolved.

    Repeated calls find everything in the cache; concurrent ones wait for the one that builds. `report` is given a line
    about anything that takes time. Raises `UserError` at the recipe's line. No process group may exist yet.
    """
    with sources.placing("model.tokenizer" if recipe.model.tokenizer else "model.path"):
        tokenizer = prepared_tokenizer(recipe.model, cache_directory())
    prepared_data = data_preparer(recipe, sources, tokenizer, report)
    with sources.placing("model.path" if recipe.model.path else "model"):
        original = materialized_model(recipe, tokenizer, prepared_data, report)
        directory = grown_model(recipe, quantized_model(recipe, original, report), tokenizer)
        plain = adapted_model(recipe.model_copy(update={"adapter": None}), directory, None)
    with sources.placing("adapter"):
        adapter = find_adapter(recipe, directory, original)
        adapted = plain if recipe.adapter is None else adapted_model(recipe, directory, adapter)
        if has_new_tokens(recipe, tokenizer):
            require_trained_vocabulary(adapted.model, recipe.adapter)
    model, config = adapted.model, adapted.model.config.get_text_config()
    with sources.placing("optimizer"):
        kept = _kept_bytes(recipe)
    with sources.placing("strategy"):
        prepare_strategy(recipe, report)
    data = prepared_data(config.vocab_size)
    train = TokenCache.open(data.train)
    evaluation = None if data.evaluation is None else TokenCache.open(data.evaluation)
    _refuse_longer_documents(model.document_limit, [train, *([evaluation] if evaluation else [])], sources)
    read_by = _read_companions(recipe, sources, directory, tokenizer, train, adapter)
    teachers = find_teachers(recipe, sources, model, read_by, train, evaluation, report)
    with sources.placing("objective.hidden_states"):
        beside = sum(rows * columns for rows, columns in map_shapes(recipe, model, teachers).values())
    steps = training_data(recipe, train, config.hidden_size, rank=0, world_size=1)
    return Prepared(
        job=Job(
            recipe=recipe,
            sources=sources,
            run_directory=Path(recipe.output_dir),
            model_directory=directory,
            adapter_directory=adapter,
            tokenizer_directory=tokenizer,
            teachers=teachers,
            train=data.train,
            evaluation=data.evaluation,
        ),
        model_type=model.config.model_type,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        model_bytes=_model_bytes(adapted, saved_dtype(recipe)),
        checkpoint_bytes=_checkpoint_bytes(adapted, recipe, kept, beside),
        data_digest=train.digest,
        examples=steps.examples_per_epoch,
        evaluation_examples=0 if evaluation is None else len(evaluation),
        supervised_tokens=sum(int(cache.num_supervised.sum()) for cache in (train, evaluation) if cache is not None),
        steps=steps.total_steps,
    )


def require_fit(job: Job, checkpoint: Path) -> None:
    """Raises `UserError` when the weights in `checkpoint` are not those of the job's model."""
    sources, began = job.sources, job.adapter_directory
    try:
        if is_adapter(checkpoint / MODEL) != (began is not None):
            what = "an adapter" if began is None else "a whole model"
            raise UserError(f"it holds {what}.")
        if began is not None:
            require_same_adapter(checkpoint / MODEL, began)
            if (base := read_base(began)) is not None:
                require_same_base(checkpoint / MODEL, base.digest, "checkpoint.resume")
        run_model(replace(job, resume=checkpoint))
    except UserError as error:
        raise sources.error(
            "checkpoint.resume",
            f"{checkpoint} does not fit this recipe: {error.message} Set that back, or begin a new run in another "
            "output_dir.",
        ) from error


def _read_companions(
    recipe: Recipe,
    sources: SourceMap,
    directory: Path,
    tokenizer_directory: Path,
    train: TokenCache,
    adapter: Path | None,
) -> Any:
    """Reads what the processes will read again, so that damage there is refused before the run begins. Returns the
    tokenizer."""
    trust = recipe.model.trust_remote_code
    with sources.placing("model.tokenizer" if recipe.model.tokenizer else "model.path"):
        tokenizer = load_tokenizer(tokenizer_directory, recipe.data.chat_template, trust_remote_code=trust)
        make_companions(directory, recipe.model, tokenizer, train, adapter)
        return tokenizer


def data_preparer(
    recipe: Recipe, sources: SourceMap, tokenizer: Path, report: Callable[[str], None]
) -> Callable[[int], PreparedData]:
    """Gives the recipe's data for a model with so many embeddings. It is prepared when it is first asked for: after the
    model, which is refused sooner, but before one that is cut by what it does with the data."""

    @cache
    def prepared(vocabulary: int) -> PreparedData:
        return prepare_data(
            recipe,
            sources,
            tokenizer_dir=tokenizer,
            vocab_size=vocabulary,
            cache_dir=cache_directory(),
            report=report,
        )

    return prepared


def materialized_model(
    recipe: Recipe, tokenizer: Path, data: Callable[[int], PreparedData], report: Callable[[str], None]
) -> Path:
    """The directory of the recipe's model, with its weights; a random or a pruned one is made, once. `data` is asked
    only for one that is cut by importance."""
    model = recipe.model
    if model.init == "random":
        return materialize_random(model, recipe.training.seed, cache_directory())
    directory = model_directory(model)
    if model.init == "pretrained":
        return directory

    def measured_on() -> tuple[Path, TokenCache]:
        grown = grown_model(recipe, directory, tokenizer)
        return grown, TokenCache.open(data(load_config(grown, model).get_text_config().vocab_size).train)

    return pruned_model(model, directory, measured_on, cache=cache_directory(), report=report)


def quantized_model(recipe: Recipe, directory: Path, report: Callable[[str], None]) -> Path:
    """The directory of the recipe's model as it is loaded: itself, or made of it once, quantized."""
    if recipe.quantization is None:
        return directory
    cache = cache_directory()
    return materialize_quantized(
        directory, recipe.quantization, identity=model_digest(directory, cache), cache=cache, report=report
    )


def grown_model(recipe: Recipe, directory: Path, tokenizer: Path) -> Path:
    """The directory of the recipe's model with a row for each new token of `tokenizer`: itself, or one laid over it."""
    if not has_new_tokens(recipe, tokenizer):
        return directory
    return grow_vocabulary(directory, recipe.model, tokenizer, find_device(), cache=cache_directory())


def has_new_tokens(recipe: Recipe, tokenizer: Path) -> bool:
    """Whether the recipe gave its tokenizer, now in `tokenizer`, tokens that it had not."""
    return bool(recipe.model.new_tokens) and tokenizer != tokenizer_directory(recipe.model)


def _model_bytes(adapted: Adapted, dtype: torch.dtype) -> int:
    return sum(
        spec_bytes(spec)
        for name, parameter in _saved(adapted)
        for spec in adapted.form.specs(
            name, stored_spec(TensorSpec(tuple(parameter.shape), parameter.dtype), dtype)
        ).values()
    )


def _saved(adapted: Adapted) -> list[tuple[str, torch.nn.Parameter]]:
    named = [(canonical_name(name), parameter) for name, parameter in adapted.model.named_parameters()]
    return [(name, parameter) for name, parameter in named if adapted.form.keeps(name)]


def _kept_bytes(recipe: Recipe) -> float:
    """Of optimizer state, for each element that is trained: asked of the optimizer itself, on a small parameter."""
    dtype = precision_of(recipe.training.precision).weights
    matrix = torch.nn.Parameter(torch.ones(64, 128, dtype=dtype))
    optimizer = make_optimizer(recipe.optimizer, [("layers.0.mlp.weight", matrix)], fused=False)
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    return sum(value.nbytes for value in kept_state(optimizer, matrix).values()) / matrix.numel()


def _checkpoint_bytes(adapted: Adapted, recipe: Recipe, kept: float, beside: int) -> int:
    """Of master weights, and of the optimizer state of those that are trained, `kept` bytes an element; with `beside`
    elements that train beside the model."""
    dtype = precision_of(recipe.training.precision).weights
    trained = sum(parameter.numel() for parameter in adapted.model.parameters() if parameter.requires_grad)
    return _model_bytes(adapted, dtype) + dtype.itemsize * beside + round(kept * (trained + beside))


def _refuse_longer_documents(limit: int | None, caches: Sequence[TokenCache], sources: SourceMap) -> None:
    longest = max(int(cache.lengths.max()) for cache in caches)
    if limit is not None and longest > limit:
        raise sources.error(
            "data.max_length",
            f"the longest example has {longest:,} tokens, but the model has positions for {limit:,}; set "
            f"data.max_length to {limit} or less.",
        )
