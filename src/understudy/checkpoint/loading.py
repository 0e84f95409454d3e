"""Reading a checkpoint back, slice by slice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from understudy.contracts import LazyTensor
from understudy.models.names import is_beside_model
from understudy.models.weights import WeightReader

__all__ = ["open_maps", "open_optimizer_state"]

OPTIMIZER = "optimizer"


def open_optimizer_state(checkpoint: Path) -> Mapping[str, Mapping[str, LazyTensor]]:
    """Optimizer state as `[parameter][key]`; nothing is read before it is indexed. Empty before the first update."""
    state: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in _stored(checkpoint).items():
        if not is_beside_model(name):
            parameter, _, key = name.rpartition(".")
            state.setdefault(parameter, {})[key] = tensor
    return state


def open_maps(checkpoint: Path) -> dict[str, LazyTensor]:
    """The weights that were trained beside the model, by canonical name; nothing is read before it is indexed."""
    return {name: tensor for name, tensor in _stored(checkpoint).items() if is_beside_model(name)}


def _stored(checkpoint: Path) -> dict[str, LazyTensor]:
    directory = checkpoint / OPTIMIZER
    if not any(directory.glob("*.safetensors")):
        return {}
    reader = WeightReader(directory)
    return {name: reader(name) for name in sorted(reader.names())}
