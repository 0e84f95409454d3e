"""Loading a saved model or adapter as anybody would, with plain transformers and peft, on the CPU."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from understudy.devices.device import find_device
from understudy.errors import UserError
from understudy.models.adapters.attachment import NAME
from understudy.models.adapters.directory import WEIGHTS, open_adapter, read_base, read_config, stored_key
from understudy.models.adapters.peft_package import import_peft
from understudy.models.architecture import UNBUILDABLE, load_config
from understudy.models.build import make_language_model, open_weights
from understudy.models.quantization.linear import QuantizedLinear
from understudy.models.weights import WeightReader
from understudy.recipe.schema import Model

__all__ = [
    "UNLOADABLE",
    "UnloadableModelError",
    "has_tokenizer",
    "reload_adapter",
    "reload_dequantized",
    "reload_model",
    "reload_tokenizer",
]

UNLOADABLE = (StrictDataclassError, SafetensorError, OSError, ImportError, *UNBUILDABLE)
"""What these libraries raise for a damaged or foreign directory."""
_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class UnloadableModelError(UserError):
    """A model directory does not load, or not as a whole."""


def reload_model(directory: Path, *, dtype: torch.dtype | Literal["auto"], trust_remote_code: bool) -> Any:
    """The transformers model in `directory`; `auto` takes the dtype that it is stored in.

    Raises `UnloadableModelError` when it does not load, and when weights are missing, left over or of another shape.
    """
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    except UNLOADABLE as error:
        hint = ""
        if not trust_remote_code and any(directory.glob("*.py")):
            hint = " It comes with code of its own; look at that, and allow it with --trust-remote-code."
        raise UnloadableModelError(
            f"does not load with transformers: {_first_line(error)}{hint}", file=directory
        ) from error
    for fault in _FAULTS:
        if found := loading.get(fault):
            raise UnloadableModelError(f"has {fault}: {sorted(map(str, found))[:3]}.", file=directory)
    return model


def reload_dequantized(directory: Path, model: Model, dtype: torch.dtype) -> Any:
    """The transformers model of the dequantized weights in `directory`, a quantized one, for what its own kernels
    would round or cannot run here. All of it is in memory. Raises `UserError` where it cannot be read."""
    built = make_language_model(directory, model, find_device(), quantized_dtype=dtype)
    read, packed = open_weights(directory, built), dict(built.network.named_modules())
    config = load_config(directory, model)
    del config.quantization_config
    network = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=model.trust_remote_code)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            layer = packed[name.rpartition(".")[0]]
            quantized = isinstance(layer, QuantizedLinear) and name.endswith(".weight")
            parameter.copy_(layer.codec.dequantize(read(name)[:]) if quantized else read(name)[:])
        buffers = dict(network.named_buffers())
        for name, values in built.persistent_buffers().items():
            buffers[name].copy_(values)
    return network


def reload_adapter(model: Any, directory: Path, *, name: str = NAME) -> Any:
    """`model`, a transformers one, with the adapter in `directory` around it, as peft loads it. Of a model that has
    adapters already, given a `name` that none of them has, it has one more.

    Raises `UnloadableModelError` when it does not load, and when parameters are missing or left over; `UserError`
    where a file of it cannot be read, or peft is not installed.
    """
    peft = import_peft()
    read_config(directory)
    stored = open_adapter(directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they are about is looked at below
            if isinstance(model, peft.PeftModel):
                adapted = model
                adapted.load_adapter(str(directory), name)
            else:
                _grow(model, stored, directory)
                adapted = peft.PeftModel.from_pretrained(model, str(directory), adapter_name=name)
            expected = peft.get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    except UNLOADABLE as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UnloadableModelError(f"does not load with peft: {reason}", file=directory) from error
    given = WeightReader(directory, only=WEIGHTS).names()
    if missing := sorted(expected.keys() - given):
        raise UnloadableModelError(f"lacks {missing[0]}, of {len(expected)} parameters.", file=directory)
    # An adapter may bring a module of the model whole, as peft does with embeddings that have grown.
    own = {stored_key(parameter) for parameter, _ in adapted.get_base_model().named_parameters(remove_duplicate=False)}
    if foreign := sorted(given - expected.keys() - own):
        raise UnloadableModelError(
            f"has {foreign[0]}, which no module of {type(adapted.get_base_model()).__name__} takes.", file=directory
        )
    return adapted


def _grow(model: Any, stored: WeightReader, directory: Path) -> None:
    """Gives `model` as many embeddings as the adapter in `directory` has, where it grew the vocabulary."""
    base = read_base(directory)
    if base is not None and not base.new_tokens:
        return
    embeddings = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is embeddings)
    rows = stored(f"{path}.weight").shape[0] if f"{path}.weight" in stored.names() else 0
    if rows > embeddings.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def reload_tokenizer(directory: Path, *, trust_remote_code: bool) -> Any:
    """The transformers tokenizer in `directory`.

    Raises `UnloadableModelError` when there is none or it does not load.
    """
    if not has_tokenizer(directory):
        raise UnloadableModelError(
            "has no tokenizer (tokenizer.json); save the model's tokenizer beside it.", file=directory
        )
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except UNLOADABLE as error:
        raise UnloadableModelError(
            f"has a tokenizer that does not load: {_first_line(error)}", file=directory
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
