"""A base's weights with an adapter added to them, one layer in memory at a time.

The arithmetic is peft's own: each of its layers gets the base's weight and the adapter's values, merges, and is emptied
again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from understudy.devices.device import find_device
from understudy.errors import UserError
from understudy.models.adapters.attachment import NAME, inject
from understudy.models.adapters.directory import CONFIG, adapter_settings, open_adapter, read_config
from understudy.models.adapters.peft_package import import_peft
from understudy.models.build import make_language_model, open_weights, shared_names
from understudy.models.names import canonical_name
from understudy.models.quantization.linear import QuantizedLinear
from understudy.recipe import schema

__all__ = ["MergedWeights", "require_mergeable"]

_MERGEABLE = ("LORA", "IA3", "VERA")
_BESIDE_WEIGHTS = {
    "ADAPTION_PROMPT": "prompts that attention looks at (LLaMA-Adapter)",
    "PROMPT_TUNING": "vectors in front of the text (prompt tuning)",
    "P_TUNING": "vectors in front of the text (P-tuning)",
    "MULTITASK_PROMPT_TUNING": "vectors in front of the text (prompt tuning)",
    "PREFIX_TUNING": "keys and values in front of the text (prefix tuning)",
}
_UNKNOWN = ("bias", "trainable_token_indices", "layer_replication", "target_parameters")
"""Settings of adapters from elsewhere that train or change what no layer's merge takes in."""
_TAKEN_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings for which peft changes the base whenever it loads the adapter."""


def require_mergeable(directory: Path) -> None:
    """Raises `UserError` when the adapter in `directory` is of a kind that no weights can take in."""
    settings = adapter_settings(directory)
    kind = settings["peft_type"]
    if kind in _BESIDE_WEIGHTS:
        raise UserError(
            f"{directory} cannot be merged: it holds {_BESIDE_WEIGHTS[kind]}, which are part of no weight of the "
            "model; export it without --merge, and use it on its base."
        )
    if kind not in _MERGEABLE:
        raise UserError(
            f"{directory} is an adapter of the kind {kind.lower():.40}, and only lora, dora, ia3 and vera are merged; "
            "export it without --merge, and use it on its base."
        )
    beginning = str(settings.get("init_lora_weights"))
    if beginning.startswith(_TAKEN_FROM_BASE):
        raise UserError(
            f"sets init_lora_weights to {beginning:.40}, so it belongs to a base from which peft took a part; convert "
            "it to a plain LoRA where it was trained (path_initial_model_for_weight_conversion of peft's "
            "save_pretrained).",
            file=directory / CONFIG,
        )
    for name in _UNKNOWN:
        if settings.get(name) not in (None, False, "none", [], {}):
            raise UserError(
                f"sets {name}, which cannot be merged here; export it without --merge, and use it on its base.",
                file=directory / CONFIG,
            )


class MergedWeights:
    """All parameters of the base in `base` with the adapter in `adapter` added, fp32, by Hugging Face name.

    A base that is quantized counts as what it is dequantized to. The adapter must fit the base, which peft says when it
    loads it; of a kind that `require_mergeable` refuses it cannot be.
    """

    def __init__(self, base: Path, adapter: Path, model: schema.Model) -> None:
        built = make_language_model(base, model, find_device(), quantized_dtype=torch.float32)
        network = built.network
        self.architecture: str = type(network).__name__
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of every parameter of the merged model, a tied one under each of its names."""
        self.tied = shared_names(network)
        """Names of each parameter that has several in the base, its canonical one first."""
        self.buffers = built.persistent_buffers()
        self._first = {alias: group[0] for group in self.tied for alias in group}
        self._read = open_weights(base, built)
        self._stored = open_adapter(adapter)
        self._quantized = {name: m for name, m in network.named_modules() if isinstance(m, QuantizedLinear)}
        for name, parameter in network.named_parameters(remove_duplicate=False):
            layer = self._quantized.get(name.removesuffix(".weight"))
            shape = parameter.shape if layer is None else (layer.out_features, layer.in_features)
            self.shapes[name] = self._stored(name).shape if name in self._stored.names() else tuple(shape)
        embeddings = network.get_input_embeddings()
        path = next(path for path, module in network.named_modules() if module is embeddings)
        self.vocabulary = self.shapes[f"{path}.weight"][0]
        """How many embeddings there are."""
        self.has_grown = self.vocabulary != embeddings.weight.shape[0]
        """Whether the adapter has more of them than the base."""
        inject(built, read_config(adapter), torch.float32)
        self._network = network
        tuners = import_peft().tuners.tuners_utils
        self._layers = {
            canonical_name(f"network.{path}.{name}"): path
            for path, module in network.named_modules()
            if isinstance(module, tuners.BaseTunerLayer)
            for name, _ in module.named_parameters()
            if name.startswith("base_layer.")
        }
        self._merged: tuple[str, dict[str, Tensor]] = ("", {})

    def base(self, name: str) -> Tensor:
        """The base's own parameter, fp32."""
        first = self._first.get(name, name)
        stored = self._read(first)[:]
        layer = self._quantized.get(first.removesuffix(".weight"))
        if layer is None or not first.endswith(".weight"):
            return stored.float()
        return layer.codec.dequantize(stored)

    def __call__(self, name: str) -> Tensor:
        """The merged parameter; the one asked for last is kept, with its layer's bias."""
        if name in self._stored.names():
            return self._stored(name)[:].float()
        if (path := self._layers.get(name)) is None:
            return self.base(name)
        if self._merged[0] != path:
            self._merged = ("", {})
            self._merged = (path, self._merge(path))
        return self._merged[1][name]

    def split_names(self) -> list[str]:
        """Those of tied names whose parameters the adapter makes differ, so that the merged model has them apart."""
        split = []
        for first, *others in self.tied:
            own = self(first)
            split += [name for name in others if not torch.equal(own, self(name))]
        return split

    def _merge(self, path: str) -> dict[str, Tensor]:
        layer: Any = self._network.get_submodule(path)
        if isinstance(layer.base_layer, QuantizedLinear):
            packed = layer.base_layer
            layer.base_layer = nn.Linear(
                packed.in_features, packed.out_features, packed.bias is not None, device="meta"
            )
        for module_path, module in layer.named_modules(prefix=f"network.{path}"):
            for name, _ in list(module.named_parameters(recurse=False)):
                parameter = canonical_name(f"{module_path}.{name}")
                values = self._stored(parameter)[:] if parameter in self._stored.names() else self.base(parameter)
                setattr(module, name, nn.Parameter(values.float().clone(), requires_grad=False))
        with torch.no_grad():
            layer.merge(adapter_names=[NAME])
        base = f"network.{path}.base_layer"
        merged = {canonical_name(f"{base}.{name}"): p.data for name, p in layer.base_layer.named_parameters()}
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
        return merged
