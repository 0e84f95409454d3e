"""What a decoder model is made of, as far as it can be cut.

Which dimension of which parameter belongs to a size is learned from the architecture itself: a network is built on the
meta device with that size doubled, and what has doubled in it follows the size. So no module is known by its name, and
what does not behave (fused projections, experts, norms over all heads) shows, and is refused.

Shape letters: H hidden width, Q query heads, K key-value heads (each with Q/K queries: a group), D head size, I
feed-forward channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from understudy.devices.cpu import CPU
from understudy.errors import UserError
from understudy.models.architecture import UNBUILDABLE, invalid_config, make_config
from understudy.models.build import make_language_model
from understudy.models.source import read_config_file
from understudy.recipe import schema

__all__ = ["Axis", "Kept", "Structure"]

Axis = Literal["channels", "queries", "keys", "width"]
Axes = Mapping[str, Mapping[int, Axis]]
"""By parameter: its dimensions that follow a size."""
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Kept:
    """What is kept of a model: indices, ascending. None where nothing of that kind is cut."""

    layers: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...] | None = None
    """Key-value heads of each kept layer; the query heads that share them are kept along."""
    channels: tuple[tuple[int, ...], ...] | None = None
    """Feed-forward channels of each kept layer."""
    width: tuple[int, ...] | None = None
    """Of the hidden states, in all layers alike."""


class Structure:
    """The model in `directory`, on the meta device. Raises `UserError` for one of which nothing can be cut: quantized,
    or with code of its own."""

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        self.directory = directory
        self.stored = read_config_file(directory)
        kind = self.stored.get("model_type")
        if self.stored.get("quantization_config"):
            raise UserError(f"{directory} is quantized, which cannot be cut; name the model that it was made from.")
        if "auto_map" in self.stored and (trust_remote_code or kind not in CONFIG_MAPPING):
            raise UserError(
                f"{directory} ships its own code, and such a model cannot be cut; name one that transformers knows"
                + (", or leave model.trust_remote_code out." if kind in CONFIG_MAPPING else ".")
            )
        # This kind of attention is the same on every device, and so is what is measured with it.
        self.model = make_language_model(directory, schema.Model(path=str(directory), attention="sdpa"), CPU())
        self._text = self.model.config.get_text_config()
        network, first = self.model.network, self.model.decoder_layers()[0]
        [name] = [name for name, module in network.named_modules() if module is first]
        self._prefix = name.removesuffix("0")
        self._shapes = _shapes(network)
        self.layers = len(self.model.decoder_layers())
        if self._size("num_hidden_layers") != self.layers:
            raise self.refusal("model.init", f"it says num_hidden_layers {self._size('num_hidden_layers')} of them")
        self.heads = self._size("num_attention_heads")
        self.groups: int = getattr(self._text, "num_key_value_heads", None) or self.heads
        self.width = self._size("hidden_size")
        self.head_size: int = getattr(self._text, "head_dim", None) or self.width // self.heads

    @property
    def channels(self) -> int:
        return self._size("intermediate_size", "model.intermediate_size")

    @property
    def queries_per_group(self) -> int:
        return self.heads // self.groups

    @cached_property
    def channel_axes(self) -> Axes:
        """Dimensions of size I. Raises `UserError` where they are not those of plain linear layers."""
        changed = self._doubled("model.intermediate_size", {"intermediate_size": 2 * self.channels})
        for name, dimensions in changed.items():
            if not self._is_linear(name) or any(self._shapes[name][i] != self.channels for i in dimensions):
                raise self.refusal(
                    "model.intermediate_size", f"{name} is no plain projection to or from the feed-forward channels"
                )
        if not changed:
            raise self.refusal("model.intermediate_size", "no weight follows its intermediate_size")
        return {name: dict.fromkeys(dimensions, "channels") for name, dimensions in changed.items()}

    @cached_property
    def head_axes(self) -> Axes:
        """Dimensions of size Q·D and K·D. Raises `UserError` where they are not those of plain linear layers."""
        axes: dict[str, dict[int, Axis]] = {}
        for name, dimensions in self._per_head("model.keep_heads").items():
            axes[name] = {}
            for i in dimensions:
                if not self._is_linear(name):
                    raise self.refusal("model.keep_heads", f"{name} joins or normalizes all of its heads")
                sizes: dict[int, Axis] = {
                    self.groups * self.head_size: "keys",
                    self.heads * self.head_size: "queries",  # the same where each query has a key of its own
                }
                if self._shapes[name][i] not in sizes:
                    raise self.refusal("model.keep_heads", f"{name} is no plain projection to or from its heads")
                axes[name][i] = sizes[self._shapes[name][i]]
        return axes

    @cached_property
    def width_axes(self) -> Axes:
        """Dimensions of size H. Raises `UserError` where other parameters than embeddings, linear layers and norms have
        them, or heads would become smaller."""
        key = "model.hidden_size"
        per_head = self._per_head(key)
        changed = self._doubled(key, {"hidden_size": 2 * self.width, "head_dim": self.head_size})
        for name, dimensions in changed.items():
            if len(self._shapes[name]) > 2 or any(self._shapes[name][i] != self.width for i in dimensions):
                raise self.refusal(key, f"{name} is neither an embedding nor a linear layer nor a norm")
            if set(dimensions) & set(per_head.get(name, ())):
                raise self.refusal(key, "the size of its heads follows from its width")
        if not changed:
            raise self.refusal(key, "no weight follows its hidden_size")
        return {name: dict.fromkeys(dimensions, "width") for name, dimensions in changed.items()}

    def layer_of(self, name: str) -> int | None:
        """The layer that a parameter or module belongs to."""
        inside = name.startswith(self._prefix)
        return int(name.removeprefix(self._prefix).partition(".")[0]) if inside else None

    def config_of(self, kept: Kept) -> dict[str, Any]:
        """config.json of what is kept."""
        sizes: dict[str, Any] = {}
        if len(kept.layers) < self.layers:
            sizes["num_hidden_layers"] = len(kept.layers)
            # What a layer is like may follow from its number; written out, it stays as it was.
            for name, value in self._text.to_dict().items():
                if "layer" in name and isinstance(value, list | tuple) and len(value) == self.layers:
                    sizes[name] = [value[i] for i in kept.layers]
        if kept.groups is not None:
            sizes |= self._head_sizes(len(kept.groups[0]) / self.groups)
        if kept.channels is not None:
            sizes["intermediate_size"] = len(kept.channels[0])
        if kept.width is not None:
            sizes |= {"hidden_size": len(kept.width), "head_dim": self.head_size}
        config = self._resized(sizes)
        config.pop("auto_map", None)  # what transformers itself calls the weights, its own class loads
        return config

    def network_of(self, kept: Kept) -> PreTrainedModel:
        """What is kept, on the meta device. Raises `UserError` where its sizes do not go together, or it is not the
        same network with less in it."""
        self._refuse_other_layers(kept)
        try:
            network = _network(self.config_of(kept))
        except UserError as error:
            reason = error.message.partition(": ")[2].partition("; ")[0] or error.message
            raise UserError(
                f"{self.stored.get('model_type')} cannot be built of the sizes asked for: {reason}; choose others.",
                key="model",
            ) from error
        shapes = _shapes(network)
        for name, shape in shapes.items():
            source = self.source(name, kept)
            if source not in self._shapes or self._cut_shape(source, kept) != shape:
                raise self.refusal("model.init", f"{name} does not become smaller as its other weights do")
        return network

    def source(self, name: str, kept: Kept) -> str:
        """What the parameter or module `name` of what is kept was called before."""
        if (layer := self.layer_of(name)) is None:
            return name
        _, dot, inside = name.removeprefix(self._prefix).partition(".")
        return f"{self._prefix}{kept.layers[layer]}{dot}{inside}"

    def cut(self, source: str, tensor: Tensor, kept: Kept) -> Tensor:
        """What is kept of the parameter `source`, all of which is in `tensor`."""
        for i, axis in self._axes_of(source, kept).items():
            tensor = tensor.index_select(i, torch.tensor(self._indices(axis, source, kept)))
        return tensor

    def refusal(self, key: str, reason: str) -> UserError:
        """That this architecture cannot be cut as the recipe's `key` asks."""
        return UserError(
            f"{self.stored.get('model_type')} cannot be cut so: {reason}; remove {key}, or choose another model.",
            key=key,
        )

    def _axes_of(self, source: str, kept: Kept) -> dict[int, Axis]:
        axes: dict[int, Axis] = {}
        if kept.groups is not None:
            axes |= self.head_axes.get(source, {})
        if kept.channels is not None:
            axes |= self.channel_axes.get(source, {})
        if kept.width is not None:
            axes |= self.width_axes.get(source, {})
        return axes

    def _indices(self, axis: Axis, source: str, kept: Kept) -> list[int]:
        if axis == "width":
            assert kept.width is not None
            return list(kept.width)
        layer = self.layer_of(source)
        assert layer is not None, "heads and channels belong to layers"
        position = kept.layers.index(layer)
        if axis == "channels":
            assert kept.channels is not None
            return list(kept.channels[position])
        assert kept.groups is not None
        rows = self.head_size * (self.queries_per_group if axis == "queries" else 1)
        return [row for group in kept.groups[position] for row in range(group * rows, (group + 1) * rows)]

    def _cut_shape(self, source: str, kept: Kept) -> tuple[int, ...]:
        axes = self._axes_of(source, kept)
        return tuple(
            len(self._indices(axes[i], source, kept)) if i in axes else size
            for i, size in enumerate(self._shapes[source])
        )

    def _head_sizes(self, factor: float) -> dict[str, Any]:
        sizes = {"num_attention_heads": round(self.heads * factor), "head_dim": self.head_size}
        if getattr(self._text, "num_key_value_heads", None) is not None:
            sizes["num_key_value_heads"] = round(self.groups * factor)
        return sizes

    def _per_head(self, key: str) -> dict[str, tuple[int, ...]]:
        """The dimensions of each parameter that follow the number of heads, their size being what it is."""
        changed = self._doubled(key, self._head_sizes(2))
        if not changed:
            raise self.refusal(key, "the size of its heads follows from its width and their number")
        return changed

    def _doubled(self, key: str, sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The dimensions of each parameter that differ where the model has `sizes` instead of its own."""
        try:
            shapes = _shapes(_network(self._resized(sizes)))
        except UserError as error:
            raise self.refusal(key, "its other sizes allow no change of that one alone") from error
        if shapes.keys() != self._shapes.keys():
            raise self.refusal(key, "it would have other weights then")
        changed = {name: _differing(self._shapes[name], shapes[name]) for name in shapes}
        return {name: dimensions for name, dimensions in changed.items() if dimensions}

    def _resized(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with other sizes, under the names that the architecture gives them; those of a model of several
        modalities are its language part's."""
        names = {name: self._text.attribute_map.get(name, name) for name in sizes}
        renamed = {names[name]: value for name, value in sizes.items()}
        nested = self.stored.get("text_config")
        own = nested if isinstance(nested, dict) else self.stored
        resized = {name: value for name, value in own.items() if name not in sizes} | renamed
        return {**self.stored, "text_config": resized} if own is nested else resized

    def _size(self, name: str, key: str = "model.init") -> int:
        size = getattr(self._text, name, None)
        if not isinstance(size, int):
            raise self.refusal(key, f"its configuration has no {name} that holds for all of its layers")
        return size

    def _is_linear(self, name: str) -> bool:
        return self.layer_of(name) is not None and isinstance(
            self.model.network.get_submodule(name.rpartition(".")[0]), nn.Linear
        )

    def _refuse_other_layers(self, kept: Kept) -> None:
        """A layer may compute something else elsewhere in the stack, by its number."""
        network = _network(self.config_of(Kept(kept.layers)))
        before = dict(self.model.network.named_modules())
        for name, module in network.named_modules():
            if (position := self.layer_of(name)) is None:
                continue
            source = before[self.source(name, kept)]
            settings, original = _settings(module), _settings(source)
            renumbered = (kept.layers[position], position)
            if type(source) is not type(module) or any(
                value != original.get(setting) and (original.get(setting), value) != renumbered
                for setting, value in settings.items()
            ):
                raise self.refusal("model.layers", f"what its layers do depends on their place ({name})")


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain values that a module's class gave it."""
    plain = (bool, int, float, str, tuple, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and name != "training" and not name.startswith("_")
    }


def _network(config: dict[str, Any]) -> PreTrainedModel:
    try:
        with torch.device("meta"), no_init_weights():
            network: PreTrainedModel = AutoModelForCausalLM.from_config(make_config(config, {}), dtype=torch.float32)
    except UNBUILDABLE as error:
        raise invalid_config(str(config.get("model_type")), {}, error) from error
    network.tie_weights()
    return network


def _shapes(network: PreTrainedModel) -> Shapes:
    """Of all that is stored, tied parameters under each of their names."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _differing(shape: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != len(other):
        return tuple(range(len(shape)))
    return tuple(i for i, (size, changed) in enumerate(zip(shape, other)) if size != changed)
