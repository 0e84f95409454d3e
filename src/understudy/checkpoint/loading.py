"""Reading a checkpoint back, slice by slice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from understudy.contracts import LazyTensor
from understudy.models.weights import WeightReader

__all__ = ["open_optimizer_state"]

OPTIMIZER = "optimizer"


def open_optimizer_state(checkpoint: Path) -> Mapping[str, Mapping[str, LazyTensor]]:
    """Optimizer state as `[parameter][key]`; nothing is read before it is indexed. Empty before the first update."""
    directory = checkpoint / OPTIMIZER
    if not any(directory.glob("*.safetensors")):
        return {}
    reader = WeightReader(directory)
    state: dict[str, dict[str, LazyTensor]] = {}
    for name in sorted(reader.names()):
        parameter, _, key = name.rpartition(".")
        state.setdefault(parameter, {})[key] = reader(name)
    return state
