"""A new adapter's first values as an adapter directory, made once: every strategy starts from the same files."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from understudy.contracts import LazyTensor
from understudy.errors import UserError
from understudy.models.adapters.attachment import NAME, wrap
from understudy.models.adapters.directory import PROMPT, WEIGHTS, BaseReference, stored_key, write_base
from understudy.models.adapters.peft_package import import_peft
from understudy.models.adapters.residual import DOWN, UP, double, is_down, is_up
from understudy.models.build import shared_names
from understudy.models.language_model import LanguageModel
from understudy.models.made_once import made_once
from understudy.models.names import canonical_name
from understudy.models.quantization.linear import QuantizedLinear

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["materialize_adapter"]

Read = Callable[[str], LazyTensor]

_DECOMPOSITIONS = {"pissa": "pissa_init", "olora": "olora_init"}
"""Beginnings that come from the weight that is adapted, and peft's method for each."""


def materialize_adapter(
    config: PeftConfig,
    model: LanguageModel,
    read: Read,
    base: BaseReference,
    *,
    seed: int,
    cache: Path,
) -> Path:
    """An adapter directory with peft's own first values for `config`, drawn under `seed`.

    `model` is the base on the meta device, which is used up, and `read` gives its weights; those that a beginning
    depends on are in memory one at a time. The directory lies in `cache` under a digest of all that
    decides its contents; one process builds it, others wait, and it appears whole. Raises `UserError` where model and
    adapter do not fit.
    """
    peft, vocabulary = import_peft(), model.config.get_text_config().vocab_size
    described = [_described(config), vars(base), vocabulary, seed, torch.__version__, peft.__version__]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
    directory = cache / "adapters" / digest[:32]
    return made_once(directory, lambda building: _build(config, model, read, base, seed, building))


def _described(config: PeftConfig) -> Mapping[str, Any]:
    values: Mapping[str, Any] = config.to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def _build(
    config: PeftConfig, model: LanguageModel, read: Read, base: BaseReference, seed: int, directory: Path
) -> None:
    settings: Any = config
    beginning = _beginning(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = _prompt(model, config, read) if _is_prompt(config) else _drawn(model, config, read)
    if beginning is not None:
        values = {name: double(name, v, v) if is_down(name) or is_up(name) else v for name, v in values.items()}
        base = replace(base, residual_rank=settings.r)
        settings.lora_alpha, settings.r = settings.lora_alpha * (2**0.5 if settings.use_rslora else 2), 2 * settings.r
        settings.init_lora_weights = True
    stored = {stored_key(name): value.float().contiguous().clone() for name, value in values.items()}
    save_file(stored, directory / WEIGHTS, {"format": "pt"})
    config.base_model_name_or_path = base.path
    config.revision = base.revision
    config.inference_mode = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.save_pretrained(str(directory))
    write_base(directory, base)


def _is_prompt(config: PeftConfig) -> bool:
    return bool(config.peft_type == import_peft().PeftType.PROMPT_TUNING)


def _beginning(config: PeftConfig) -> str | None:
    initial = str(getattr(config, "init_lora_weights", None))
    return next((kind for kind in _DECOMPOSITIONS if initial.startswith(kind)), None)


def _prompt(model: LanguageModel, config: Any, read: Read) -> dict[str, Tensor]:
    """The vectors of tokens taken at random, which learn faster than random vectors (Lester et al., 2021, figure 3)."""
    embeddings = model.network.get_input_embeddings()
    path = next(path for path, module in model.network.named_modules() if module is embeddings)
    table = read(f"{path}.weight")
    rows = torch.randint(table.shape[0], (config.num_virtual_tokens,)).tolist()
    return {PROMPT: torch.cat([table[row : row + 1] for row in rows])}


def _drawn(model: LanguageModel, config: PeftConfig, read: Read) -> dict[str, Tensor]:
    """What peft draws, by canonical name, the model's own parameters that are trained too, and what depends on a weight
    of the base: one is in memory at a time."""
    settings: Any = config
    values = _whole_modules(model, config, read)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # All zeros at no cost in memory, for peft to see the shape of.
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    plain = copy.deepcopy(settings)
    if hasattr(plain, "use_dora"):
        plain.use_dora = False
    if _beginning(config) is not None:
        plain.init_lora_weights = True
    wrap(model, plain, low_cpu_mem_usage=False)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values[canonical_name(name)] = parameter.detach()
    if _beginning(config) is not None or getattr(settings, "use_dora", False):
        for path, layer in model.network.named_modules():
            if NAME in getattr(layer, "lora_A", ()):
                values |= _of_weight(layer, canonical_name(f"network.{path}.base_layer.weight"), config, read)
    return values


def _whole_modules(model: LanguageModel, config: Any, read: Read) -> dict[str, Tensor]:
    """The parameters of modules that are trained whole, under every name that they have."""
    names = set(getattr(config, "modules_to_save", None) or ())
    canonical = {alias: group[0] for group in shared_names(model.network) for alias in group}
    return {
        f"{path}.{name}": read(canonical.get(f"{path}.{name}", f"{path}.{name}"))[:]
        for path, module in model.network.named_modules()
        if path.rpartition(".")[2] in names
        for name, _ in module.named_parameters(recurse=False)
    }


def _of_weight(layer: Any, name: str, config: Any, read: Read) -> dict[str, Tensor]:
    """The values of a LoRA `layer` that depend on the weight `name`, which it adapts."""
    linear, path, values = layer.base_layer, name.removesuffix(".weight"), {}
    if isinstance(linear, QuantizedLinear):
        linear.weight = nn.Parameter(read(name)[:], requires_grad=False)
        weight = linear.dequantize().float()
    else:
        weight = read(name)[:].float()
    if isinstance(linear, Conv1D):
        weight = weight.T
    if config.use_dora:
        # The magnitude of the weight as it is: what the adapter adds is nothing at first.
        values[f"{path}.lora_magnitude_vector"] = torch.linalg.norm(weight, dim=1)
    if (beginning := _beginning(config)) is not None:
        if config.r > min(weight.shape):
            raise UserError(
                f"`adapter.rank` is {config.r}, and {name} has {min(weight.shape)} directions to begin with; lower it "
                "to that, or take another `adapter.init`.",
                key="adapter.rank",
            )
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
        layer.base_layer, layer.fan_in_fan_out = plain, False
        method = getattr(layer, _DECOMPOSITIONS[beginning])
        method(NAME, config.init_lora_weights) if beginning == "pissa" else method(NAME)
        values[path + DOWN] = layer.lora_A[NAME].weight.detach()
        values[path + UP] = layer.lora_B[NAME].weight.detach()
    layer.base_layer = nn.Identity()  # the weight is not needed any more
    return values
