"""How an adapter's parameters lie in peft's file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from understudy.contracts import TensorSpec
from understudy.models.adapters.directory import open_adapter, read_base, stored_key
from understudy.models.adapters.residual import double, first_values, is_down, is_up
from understudy.models.build import shared_names
from understudy.models.language_model import LanguageModel
from understudy.models.weights import WeightReader

__all__ = ["AdapterForm"]


class AdapterForm:
    """The parameters that are trained, in one file, under peft's keys: a tied one under each of its names, a residual
    adapter's with its first values behind the trained ones."""

    stem = "adapter_model"
    spread = False
    """peft reads one file, so one rank writes it."""
    keeps_buffers = False

    def __init__(self, names: frozenset[str], aliases: Mapping[str, list[str]], first: WeightReader | None) -> None:
        self._names, self._aliases, self._first = names, aliases, first

    @staticmethod
    def of(model: LanguageModel, directory: Path, names: frozenset[str]) -> AdapterForm:
        """Of `model` with the adapter that began in `directory`, of which `names` are trained."""
        base = read_base(directory)
        residual = base is not None and base.residual_rank is not None
        aliases = {group[0]: group for group in shared_names(model.network)}
        return AdapterForm(names, aliases, open_adapter(directory) if residual else None)

    def keeps(self, name: str) -> bool:
        return name in self._names

    def specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        shape = spec.shape
        if self._first is not None and (is_down(name) or is_up(name)):
            shape = self._first(name).shape
        return {stored_key(key): TensorSpec(shape, spec.dtype) for key in self._aliases.get(name, [name])}

    def parts(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        values = tensor
        if self._first is not None and (is_down(name) or is_up(name)):
            rank = tensor.shape[0 if is_down(name) else 1]
            values = double(name, tensor, first_values(name, self._first(name)[:].to(tensor), rank))
        for key in self._aliases.get(name, [name]):
            yield stored_key(key), values
