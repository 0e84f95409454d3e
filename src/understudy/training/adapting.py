"""The adapter that a run trains: found or made before any process starts, and put around the model in each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from understudy.checkpoint.form import WHOLE_MODEL, Form
from understudy.contracts import LazyTensor
from understudy.devices.device import find_device
from understudy.models.adapters.attachment import adapt, trained_names
from understudy.models.adapters.directory import BaseReference
from understudy.models.adapters.form import AdapterForm
from understudy.models.adapters.initialization import materialize_adapter
from understudy.models.adapters.peft_package import require_peft
from understudy.models.adapters.registry import make_config
from understudy.models.build import make_language_model, open_weights
from understudy.models.identity import model_digest
from understudy.models.language_model import LanguageModel
from understudy.recipe.adapters import Freeze
from understudy.recipe.environment import cache_directory
from understudy.recipe.schema import Recipe
from understudy.strategies.precision import precision_of
from understudy.training.existing_adapter import require_adapter, require_same_base

__all__ = ["Adapted", "adapted_model", "find_adapter", "saved_dtype"]

Read = Callable[[str], LazyTensor]


@dataclass(frozen=True)
class Adapted:
    """A recipe's model on the meta device, adapter and all."""

    model: LanguageModel
    read: Read
    """Gives its weights."""
    form: Form
    """How what is trained of it is saved."""


def adapted_model(recipe: Recipe, directory: Path, adapter: Path | None, *, weights: Path | None = None) -> Adapted:
    """The recipe's model in `directory`, with its weights there or in `weights`, and the adapter in the directory
    `adapter` around it. Raises `UserError` where these do not fit together."""
    dtype = precision_of(recipe.training.precision).compute
    model = make_language_model(directory, recipe.model, find_device(), quantized_dtype=dtype)
    read = adapt(model, open_weights(weights or directory, model), recipe.adapter, adapter, dtype)
    form = WHOLE_MODEL if adapter is None else AdapterForm.of(model, adapter, trained_names(model))
    return Adapted(model, read, form)


def find_adapter(recipe: Recipe, model_directory: Path, original: Path) -> Path | None:
    """The directory with the adapter's first values: the recipe's `adapter.path`, or a new one in the cache; None where
    the model's own parameters are trained.

    `original` holds the base as it was before it was quantized into `model_directory`. Raises `UserError` where adapter
    and model do not fit.
    """
    adapter = recipe.adapter
    if adapter is None or isinstance(adapter, Freeze):
        return None
    require_peft()
    base, dtype = _base(recipe, original), precision_of(recipe.training.precision).compute
    model = make_language_model(model_directory, recipe.model, find_device(), quantized_dtype=dtype)
    config = make_config(adapter, model.network)
    if adapter.path is not None:
        directory = Path(adapter.path).expanduser()
        require_adapter(directory, adapter, config.to_dict())
        require_same_base(directory, base.digest, "adapter.path")
        return directory
    read = open_weights(model_directory, model)
    return materialize_adapter(config, model, read, base, seed=recipe.training.seed, cache=cache_directory())


def saved_dtype(recipe: Recipe) -> torch.dtype:
    """Of the final model: what it computed in; an adapter, which is small, is kept as it was trained."""
    precision = precision_of(recipe.training.precision)
    whole = recipe.adapter is None or isinstance(recipe.adapter, Freeze)
    return precision.compute if whole else precision.weights


def _base(recipe: Recipe, original: Path) -> BaseReference:
    named = recipe.model.path if recipe.model.init == "pretrained" else None
    place = str(original.resolve()) if named is None or Path(named).expanduser().is_dir() else named
    return BaseReference(
        path=place,
        revision=recipe.model.revision,
        digest=model_digest(original, cache_directory()),
        quantization=None if recipe.quantization is None else recipe.quantization.model_dump(mode="json"),
        new_tokens=recipe.model.new_tokens,
    )
