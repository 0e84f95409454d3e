"""Puts an adapter around a model that is still on the meta device."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from understudy.contracts import LazyTensor
from understudy.errors import UserError
from understudy.models.adapters.directory import open_adapter, read_base, read_config
from understudy.models.adapters.freeze import freeze
from understudy.models.adapters.peft_package import import_peft
from understudy.models.adapters.projections import draw_projections
from understudy.models.adapters.residual import DOWN, Residual, halved_config
from understudy.models.build import shared_names
from understudy.models.language_model import LanguageModel
from understudy.models.names import canonical_name
from understudy.models.weights import WeightReader
from understudy.recipe.adapters import Adapter, Freeze

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["NAME", "adapt", "inject", "trained_names", "wrap"]

Read = Callable[[str], LazyTensor]

NAME = "default"
"""peft's name for an adapter that is alone; it is in no file."""


def adapt(
    model: LanguageModel, read: Read, adapter: Adapter | None, directory: Path | None, compute_dtype: torch.dtype
) -> Read:
    """Makes of `model` what the recipe's `adapter` says: leaves `requires_grad` with what is trained, and puts the
    adapter in `directory`, where there is one, around it. All of a model without adapter is trained.

    `read` gives the weights of `model` as it comes; what is returned gives those of what it has become, under canonical
    names. Raises `UserError` where model and adapter do not fit.
    """
    if isinstance(adapter, Freeze):
        freeze(model, adapter)
        return read
    if directory is None:
        return read
    config, base, stored = read_config(directory), read_base(directory), open_adapter(directory)
    if base is None or base.residual_rank is None:
        inject(model, config, compute_dtype)
        _require_weights(model, stored, directory)
        return lambda name: stored(name) if name in stored else read(name)
    inject(model, halved_config(config), compute_dtype)
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    residual = Residual(read, stored, base.residual_rank, scaling)

    def read_residual(name: str) -> LazyTensor:
        if name in stored:
            return residual.adapter(name)
        adapted = name.removesuffix(".weight") + DOWN in stored
        return residual.base(name) if adapted else read(name)

    return read_residual


def inject(model: LanguageModel, config: PeftConfig, compute_dtype: torch.dtype) -> None:
    """Puts the adapter that `config` describes around `model`, both without values; it alone requires gradients, and
    what `config.modules_to_save` names of the model. What layers share and never train is real, in `compute_dtype`."""
    whole = set(getattr(config, "modules_to_save", None) or ())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config.peft_type == import_peft().PeftType.PROMPT_TUNING:
        settings: Any = config
        shape = (settings.num_virtual_tokens, settings.token_dim)
        model.prompt_embeddings = nn.Parameter(torch.empty(shape, device="meta"))
        return
    plain = copy.deepcopy(config)
    if hasattr(plain, "init_lora_weights"):
        plain.init_lora_weights = True
    wrap(model, plain, low_cpu_mem_usage=True)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                empty = torch.empty_like(parameter, device="meta", dtype=torch.float32)
                setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    if config.peft_type == import_peft().PeftType.VERA:
        draw_projections(model, plain, compute_dtype)
    for path, module in model.network.named_modules():
        if path.rpartition(".")[2] in whole:
            module.requires_grad_(True)


def wrap(model: LanguageModel, config: PeftConfig, *, low_cpu_mem_usage: bool) -> None:
    """Has peft put its layers into the network, with values of their own unless `low_cpu_mem_usage`. The model's own
    modules are left where they are, so that the head stays the module that computes the loss."""
    peft = import_peft()
    plain = copy.deepcopy(config)
    plain.inference_mode = False
    if hasattr(plain, "modules_to_save"):
        plain.modules_to_save = None
    # A tuner puts its layers into the network; `inject_adapter_in_model` would refuse those whose layers share state.
    tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights and merging, which are looked after elsewhere
        try:
            if config.peft_type == peft.PeftType.ADAPTION_PROMPT:
                tuner(model.network, {NAME: plain}, NAME)
            else:
                tuner(model.network, plain, NAME, low_cpu_mem_usage=low_cpu_mem_usage)
        except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
            raise UserError(
                f"peft cannot put this adapter around a {model.config.model_type} model: "
                f"{' '.join(str(error).split())[:300]}",
                key="adapter",
            ) from error


def trained_names(model: LanguageModel) -> frozenset[str]:
    """Canonical names of what is trained, before a strategy wraps the model."""
    return frozenset(canonical_name(name) for name, p in model.named_parameters() if p.requires_grad)


def _require_weights(model: LanguageModel, stored: WeightReader, directory: Path) -> None:
    """Raises `UserError` unless `stored` has all that is trained of `model`, in the right shapes, and nothing else."""
    shapes = {canonical_name(name): tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    wrong = [name for name, shape in shapes.items() if name in stored and stored(name).shape != shape]
    missing = [name for name in shapes if name not in stored]
    # A tied weight is stored under each of its names.
    aliases = {name for names in shared_names(model.network) for name in names}
    foreign = [name for name in sorted(stored.names()) if name not in shapes and name not in aliases]
    for kind, names in (("lacks", missing), ("has another shape of", wrong), ("has, for no module of it,", foreign)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{directory} is an adapter of another model than this {model.config.model_type}: it {kind} "
                f"{names[0]}{more}; name the model that it was trained on.",
                key="adapter.path",
            )
