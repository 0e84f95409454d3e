"""Builds a `LanguageModel` from a model directory: parameters on the meta device, buffers real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights

from understudy.contracts import LazyTensor
from understudy.devices.device import Device
from understudy.errors import UserError
from understudy.models.architecture import UNBUILDABLE, document_limit, invalid_config, load_config
from understudy.models.attention import register_attention
from understudy.models.head import LossHead
from understudy.models.language_model import LanguageModel
from understudy.models.probe import find_logit_transform
from understudy.models.quantization.linear import QuantizedLinear, replace_linears
from understudy.models.quantization.packed import packed_tensors
from understudy.models.quantization.scheme import scheme_of
from understudy.models.weights import WeightReader
from understudy.recipe import schema

__all__ = ["make_language_model", "open_weights", "shared_names"]


def make_language_model(
    directory: Path, model: schema.Model, device: Device, *, quantized_dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """The architecture in `directory` with `model.config` applied, document-aware attention and the loss head.

    Parameters are fp32 on the meta device and hold nothing; layers that are stored quantized compute in
    `quantized_dtype`, and their weights are bytes that pretend to be of it. Buffers (rotary frequencies …) are real, on
    the CPU. Reads no weights but persistent buffers. Raises `UserError` for an architecture that cannot be trained on
    flat batches.
    """
    config = load_config(directory, model)
    attention = register_attention(model.attention, device)
    try:
        with torch.device("meta"), no_init_weights():
            network: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=model.trust_remote_code
            )
    except UNBUILDABLE as error:
        # Some architectures look our attention up among classes of their own.
        if isinstance(error, KeyError) and attention in error.args:
            raise _not_document_aware(config.model_type) from error
        raise invalid_config(config.model_type, model.config, error) from error
    if not network.is_backend_compatible():
        raise _not_document_aware(config.model_type)
    network.tie_weights()
    _make_buffers_real(network)
    if (scheme := scheme_of(config.to_dict())) is not None:
        replace_linears(network, scheme, quantized_dtype, WeightReader(directory))
    _replace_head(network)
    built = LanguageModel(network, document_limit(network))
    _load_persistent_buffers(built, directory)
    return built


def open_weights(directory: Path, model: LanguageModel) -> Callable[[str], LazyTensor]:
    """A reader of `directory` under `model`'s parameter names, checked to hold all of them in the right shapes. `model`
    is as `make_language_model` gives it."""
    network = model.network
    aliases: dict[str, list[str]] = {}
    for first, *others in shared_names(network):
        aliases[first] = others
    renamed = _renamed(network, WeightReader(directory).names())
    reader = WeightReader(directory, renamed=renamed, aliases=aliases)
    quantized = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    whole = {name: tuple(p.shape) for name, p in network.named_parameters() if name not in quantized}
    reader.check(whole)
    return packed_tensors(reader, network) if quantized else reader


def _not_document_aware(model_type: str) -> UserError:
    return UserError(
        f"{model_type} cannot be made document-aware: its layers do not go through transformers' attention interface; "
        "choose another architecture."
    )


def _make_buffers_real(network: PreTrainedModel) -> None:
    """Computes buffers the way `from_pretrained` does after a start on the meta device: real memory, filled by the
    architecture's own initialisation, which leaves alone what is marked as initialised."""
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        vars(module).pop("_is_hf_initialized", None)
    for parameter in network.parameters():
        vars(parameter)["_is_hf_initialized"] = True
    network.initialize_weights()


def _load_persistent_buffers(model: LanguageModel, directory: Path) -> None:
    buffers = model.persistent_buffers()
    if buffers:
        reader = WeightReader(directory)
        for name, buffer in buffers.items():
            if name in reader:
                buffer.copy_(reader(name)[:])


def _replace_head(network: PreTrainedModel) -> None:
    linear = network.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise UserError(
            f"{type(network).__name__} has no linear output layer, so its loss cannot be computed in chunks; choose a "
            "decoder-only language model."
        )
    transform = find_logit_transform(network)
    head = LossHead.replacing(linear)
    head.transform = transform
    network.set_output_embeddings(head)


def _renamed(network: PreTrainedModel, stored: set[str]) -> dict[str, str]:
    """Stored name: name in the model, where transformers renames an architecture's weights as it loads them. What it
    would also have to fuse or split keeps its name, and so is found missing."""
    renamings = [rule for rule in get_model_conversion_mapping(network) if isinstance(rule, WeightRenaming)]
    known = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    renamed = {name: rename_source_key(name, renamings, [])[0] for name in stored if name not in known}
    return {name: new for name, new in renamed.items() if new in known}


def shared_names(network: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several, its canonical one first."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]
