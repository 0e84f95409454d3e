"""Adapters that begin with a part of each weight (PiSSA, OLoRA): the base is trained on without that part.

With s the scaling, A₀ and B₀ the first values, the layer computes W − sB₀A₀ + sBA. Files hold it as a LoRA of twice the
rank around W itself, [A; A₀] and [B, −B₀], so that peft loads it on the base that everybody has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from understudy.contracts import LazyTensor

__all__ = ["DOWN", "UP", "Residual", "double", "first_values", "halved_config", "is_down", "is_up"]

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
Read = Callable[[str], LazyTensor]


def is_down(name: str) -> bool:
    """Whether a parameter is an A, [rank, in]."""
    return name.endswith(DOWN)


def is_up(name: str) -> bool:
    """Whether a parameter is a B, [out, rank]."""
    return name.endswith(UP)


def double(name: str, trained: Tensor, first: Tensor) -> Tensor:
    """What files hold of an A or a B: the trained values, and behind them the first ones, which are taken away."""
    return torch.cat([trained, first]) if is_down(name) else torch.cat([trained, -first], dim=1)


def first_values(name: str, stored: Tensor, rank: int) -> Tensor:
    """The other way round: the first values of an A or a B of `rank`, out of what files hold."""
    return stored[rank:] if is_down(name) else -stored[:, rank:]


def halved_config(config: Any) -> Any:
    """The configuration of the layers that are trained, from that of the files; the scaling stays the same."""
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha = config.r // 2, config.lora_alpha / factor
    return config


class Residual:
    """Reads base and adapter as the layers have them, out of `base`, whose weights are whole, and `files`, an adapter's
    of twice the rank `rank`."""

    def __init__(self, base: Read, files: Read, rank: int, scaling: float) -> None:
        self._base, self._files, self._rank, self._scaling = base, files, rank, scaling

    def adapter(self, name: str) -> LazyTensor:
        """A parameter of the adapter."""
        if is_down(name):
            return _Whole(self._files(name)[: self._rank])
        if is_up(name):
            return _Whole(self._files(name)[:][:, : self._rank].contiguous())
        return self._files(name)

    def first(self, name: str) -> Tensor:
        """The first values of an A or a B."""
        return first_values(name, self._files(name)[:], self._rank)

    def base(self, name: str) -> LazyTensor:
        """A weight of the base that an A and a B adapt, less the part that these began with."""
        layer = name.removesuffix(".weight")
        return _Less(self._base(name), self.first(layer + UP) * self._scaling, self.first(layer + DOWN))


class _Whole:
    """A tensor in memory, read like one on disk."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self.shape, self.dtype = tuple(values.shape), values.dtype

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        return self._values[index]


class _Less:
    """`weight` [out, in] less `up` [out, rank] · `down` [rank, in], in fp32."""

    def __init__(self, weight: LazyTensor, up: Tensor, down: Tensor) -> None:
        self._weight, self._up, self._down = weight, up, down
        self.shape, self.dtype = weight.shape, torch.float32

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        rows, columns = (*(index if isinstance(index, tuple) else (index,)), slice(None), slice(None))[:2]
        return self._weight[rows, columns].float() - self._up[rows].float() @ self._down[:, columns].float()
