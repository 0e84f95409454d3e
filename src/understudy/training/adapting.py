"""The adapter that a run trains: found or made before any process starts, and put around the model in each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from understudy.checkpoint.form import WHOLE_MODEL, Form
from understudy.contracts import LazyTensor
from understudy.devices.device import find_device
from understudy.errors import UserError
from understudy.models.adapters.attachment import adapt, trained_names
from understudy.models.adapters.directory import (
    BaseReference,
    adapter_settings,
    is_adapter,
    open_adapter,
    read_base,
)
from understudy.models.adapters.form import AdapterForm
from understudy.models.adapters.initialization import materialize_adapter
from understudy.models.adapters.library import require_peft
from understudy.models.adapters.registry import make_config
from understudy.models.build import make_language_model, open_weights
from understudy.models.identity import model_digest
from understudy.models.language_model import LanguageModel
from understudy.recipe.adapters import Freeze, PeftAdapter
from understudy.recipe.environment import cache_directory
from understudy.recipe.schema import Recipe
from understudy.strategies.precision import precision_of

__all__ = ["Adapted", "adapted_model", "find_adapter", "require_same_base", "saved_dtype"]

Read = Callable[[str], LazyTensor]


@dataclass(frozen=True)
class Adapted:
    """A recipe's model on the meta device, adapter and all."""

    model: LanguageModel
    read: Read
    """Gives its weights."""
    form: Form
    """How what is trained of it is saved."""


def adapted_model(recipe: Recipe, weights: Path, adapter: Path | None) -> Adapted:
    """The recipe's model with the weights in `weights`, and the adapter in the directory `adapter` around it. Raises
    `UserError` where these do not fit together."""
    dtype = precision_of(recipe.training.precision).compute
    model = make_language_model(weights, recipe.model, find_device(), quantized_dtype=dtype)
    read = adapt(model, open_weights(weights, model), recipe.adapter, adapter, dtype)
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
    base = _base(recipe, original)
    if adapter.path is not None:
        directory = Path(adapter.path).expanduser()
        _require_adapter(directory, adapter)
        require_same_base(directory, base.digest, "adapter.path")
        return directory
    make = _maker(recipe, model_directory)
    model = make()
    config = make_config(adapter, model.network)
    return materialize_adapter(
        config,
        make,
        open_weights(model_directory, model),
        base,
        seed=recipe.training.seed,
        vocabulary=model.config.get_text_config().vocab_size,
        cache=cache_directory(),
    )


def saved_dtype(recipe: Recipe) -> torch.dtype:
    """Of the final model: what it computed in; an adapter, which is small, is kept as it was trained."""
    precision = precision_of(recipe.training.precision)
    whole = recipe.adapter is None or isinstance(recipe.adapter, Freeze)
    return precision.compute if whole else precision.weights


def require_same_base(directory: Path, digest: str, key: str) -> None:
    """Raises `UserError` when the adapter in `directory` says that it was trained on another model than that with
    `digest`."""
    known = read_base(directory)
    if known is not None and known.digest != digest:
        raise UserError(
            f"{directory} is an adapter of another model: it was trained on {known.path}"
            + (f" (revision {known.revision})" if known.revision else "")
            + ", whose weights are not those of this one; name that model in model.path.",
            key=key,
        )


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


def _maker(recipe: Recipe, model_directory: Path) -> Callable[[], LanguageModel]:
    dtype = precision_of(recipe.training.precision).compute
    return lambda: make_language_model(model_directory, recipe.model, find_device(), quantized_dtype=dtype)


_PEFT_TYPES = {
    "lora": "LORA",
    "dora": "LORA",
    "ia3": "IA3",
    "vera": "VERA",
    "llama_adapter": "ADAPTION_PROMPT",
    "prompt_tuning": "PROMPT_TUNING",
}
_STORED = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rank_stabilized": "use_rslora",
    "layers": "layers_to_transform",
}
"""Fields that an existing adapter has settled, by their names in its configuration."""
_OF_NEW_ADAPTERS = ("init", "train", "tokens", "adapted_layers", "targets")


def _require_adapter(directory: Path, adapter: PeftAdapter) -> None:
    """Raises `UserError` unless `directory` holds an adapter of the kind that the recipe names, whose settings the
    recipe does not contradict."""
    if not is_adapter(directory):
        what = "is no adapter (no adapter_config.json in it)" if directory.is_dir() else "is no directory"
        raise UserError(f"{directory} {what}; name one that a run or peft saved.", key="adapter.path")
    settings = adapter_settings(directory)
    kind: str = adapter.kind  # type: ignore[attr-defined]  # every class of the union has one
    is_dora = bool(settings.get("use_dora"))
    if settings["peft_type"] != _PEFT_TYPES[kind] or (kind in ("lora", "dora") and is_dora != (kind == "dora")):
        found = "DORA" if is_dora else settings["peft_type"]
        raise UserError(
            f"{directory} is an adapter of the kind {found.lower()}, not {kind}; correct `adapter.kind`.",
            key="adapter.kind",
        )
    for field in sorted(adapter.model_fields_set - {"path", "kind"}):
        stored = settings.get(_STORED.get(field, field))
        if field in _OF_NEW_ADAPTERS or not _equal(getattr(adapter, field), stored):
            says = "" if field in _OF_NEW_ADAPTERS else f", which says {stored}"
            raise UserError(
                f"`adapter.{field}` is settled by the adapter in {directory}{says}; remove it.", key=f"adapter.{field}"
            )
    open_adapter(directory)


def _equal(asked: Any, stored: Any) -> bool:
    return list(asked) == stored if isinstance(asked, tuple) else bool(asked == stored)
