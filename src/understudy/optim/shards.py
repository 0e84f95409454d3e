"""Optimizers over FSDP2 parameters: elementwise ones on plain local shards, others with what they need of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from understudy.optim.state import KeepsOwnForm, Kept, kept_state, restore_state

__all__ = ["LocalShards", "over_local_shards", "replicated", "sharded_like"]

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def over_local_shards(groups: list[dict[str, Any]], make: MakeOptimizer) -> torch.optim.Optimizer:
    """`make(groups)`, over local shards where parameters are DTensors.

    Only for optimizers whose update of an element depends on that element alone. Kernels written for plain tensors
    (bitsandbytes, Triton) then work on sharded parameters, without a DTensor dispatch for every operation.
    """
    if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
        return LocalShards(groups, make)
    return make(groups)


class LocalShards(torch.optim.Optimizer):
    """An optimizer over DTensors that runs another over their local shards. `state` holds local tensors."""

    def __init__(self, groups: list[dict[str, Any]], make: MakeOptimizer) -> None:
        self._shards = {
            parameter: nn.Parameter(_local(parameter).detach(), requires_grad=parameter.requires_grad)
            for group in groups
            for parameter in group["params"]
        }
        self._inner = make([self._with_params(group, self._shards.__getitem__) for group in groups])
        outer = {shard: parameter for parameter, shard in self._shards.items()}
        inner_groups = self._inner.param_groups
        super().__init__([self._with_params(group, outer.__getitem__) for group in inner_groups], self._inner.defaults)

    @staticmethod
    def _with_params(group: dict[str, Any], translate: Callable[[nn.Parameter], nn.Parameter]) -> dict[str, Any]:
        return {**group, "params": [translate(parameter) for parameter in group["params"]]}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("the gradient is computed before the step; a closure would compute it again.")
        for parameter, shard in self._shards.items():
            # FSDP2 may move a shard to another storage (offload, a load), and a rank may hold no element of it.
            shard.data = _local(parameter)
            shard.grad = None if parameter.grad is None or shard.numel() == 0 else _local(parameter.grad)
            if parameter in self.state:
                self._inner.state[shard] = self.state[parameter]
        # The groups' settings, and what the inner optimizer keeps in them, such as a step count.
        for mine, inner in zip(self.param_groups, self._inner.param_groups):
            inner.update({key: value for key, value in mine.items() if key != "params"})
        self._inner.step()
        for mine, inner in zip(self.param_groups, self._inner.param_groups):
            mine.update({key: value for key, value in inner.items() if key != "params"})
        for parameter, shard in self._shards.items():
            shard.grad = None
            if shard in self._inner.state:
                self.state[parameter] = self._inner.state[shard]
        return None

    def kept_state(self, parameter: Tensor) -> Kept:
        """Of the local shard. One without elements is never updated; it has empty tensors for what its siblings keep,
        so that all ranks name the same ones."""
        shard = self._shards[cast(nn.Parameter, parameter)]
        if shard.numel() or isinstance(self._inner, KeepsOwnForm):
            return kept_state(self._inner, shard)
        sibling = next((other for other in self._shards.values() if other.numel()), None)
        kept = {} if sibling is None else kept_state(self._inner, sibling)
        return {key: value.new_empty(shard.shape) if value.ndim else value for key, value in kept.items()}

    def restore_state(self, parameter: Tensor, kept: Kept) -> None:
        shard = self._shards[cast(nn.Parameter, parameter)]
        shard.data = _local(parameter)
        if shard.numel():
            restore_state(self._inner, shard, {key: _local(value) for key, value in kept.items()})
            self.state[parameter] = self._inner.state[shard]


def replicated(tensor: Tensor) -> Tensor:
    """`tensor` with every shard and partial sum of a DTensor put together on every rank; a collective for DTensors."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
    return whole


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A plain `tensor`, the same on every rank, laid out like `parameter` where that is a DTensor. No collective."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh = parameter.device_mesh
    whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=parameter.placements)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
