"""The weights and optimizer state of a ZeRO engine (stages 1–3) by parameter, whole, out of its flat partitions.

Gathering copies bits: DeepSpeed's own `safe_get_full_*` helpers of stages 1 and 2 add floats, which loses the sign of a
zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from understudy.contracts import LazyTensor, TensorSpec
from understudy.optim.state import Kept, kept_state, restore_state
from understudy.strategies.zero_partitions import read_flat, shape_of

__all__ = ["ZeroState"]

_FLATS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""Where a ZeRO-3, a ZeRO-1 or 2, and a bf16 ZeRO-1 optimizer has its fp32 partitions, one a group."""


class Part(NamedTuple):
    """This rank's part of a parameter: elements [start, start + numel) of it are [offset, offset + numel) of flat
    partition `group`. The last rank's part may go past the parameter's end."""

    group: int
    offset: int
    start: int
    numel: int


class ZeroState:
    """`optimizer` is the engine's, `named` the trained parameters by canonical name. To read and to set are
    collectives."""

    def __init__(self, optimizer: Any, named: Mapping[str, nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._inner: torch.optim.Optimizer = optimizer.optimizer
        self._named = named
        self._flats: list[Tensor] = next(getattr(optimizer, name) for name in _FLATS if hasattr(optimizer, name))
        lists = ("bit16_groups", "bf16_groups", "fp16_groups")
        groups = next(getattr(optimizer, name) for name in lists if hasattr(optimizer, name))
        self._groups = {id(parameter): index for index, group in enumerate(groups) for parameter in group}

    def layout(self) -> dict[str, TensorSpec]:
        """Name, full shape and dtype of every tensor of optimizer state; empty before the first update."""
        return {
            f"{name}.{key}": TensorSpec(shape_of(parameter) if value.ndim else (), value.dtype)
            for name, parameter in self._named.items()
            for key, value in self._kept(self._groups[id(parameter)]).items()
        }

    def tensors(self, owned: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        """Optimizer state in `layout` order, whole, one at a time; yields those owned."""
        kept = [self._kept(group) for group in range(len(self._flats))]
        for name, parameter in self._named.items():
            part = self._part(parameter)
            for key, value in kept[self._groups[id(parameter)]].items():
                whole = self._whole(parameter, part, self._local(parameter, part, value, key)) if value.ndim else value
                if owned(f"{name}.{key}"):
                    yield f"{name}.{key}", whole

    def weight(self, name: str) -> Tensor:
        """The whole fp32 master weight."""
        parameter = self._named[name]
        part, flat = self._part(parameter), self._flats[self._groups[id(parameter)]]
        return self._whole(parameter, part, self._local(parameter, part, flat.detach()))

    def load(self, stored: Mapping[str, Mapping[str, LazyTensor]]) -> None:
        """Sets optimizer state from `stored[parameter][key]`; each rank reads only what it holds."""
        for group in range(len(self._flats)):
            members = {name: p for name, p in self._named.items() if self._groups[id(p)] == group}
            with _swapped_in(self._optimizer, group):
                restore_state(self._inner, self._flats[group], self._read(self._flats[group], members, stored))
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            # Else DeepSpeed's own helpers would not find what was put there.
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _read(
        self, flat: Tensor, members: Mapping[str, nn.Parameter], stored: Mapping[str, Mapping[str, LazyTensor]]
    ) -> Kept:
        """State of a whole partition, from what is stored of each parameter; zeros for one of which a key is not."""
        kept: Kept = {}
        for name, parameter in members.items():
            part = self._part(parameter)
            for key, value in stored[name].items():
                if not value.shape:
                    kept[key] = value[()]
                    continue
                if key not in kept:
                    kept[key] = torch.zeros(flat.shape, dtype=value.dtype, device=flat.device)
                if part is not None:
                    values = read_flat(value, part.start, part.start + part.numel)
                    kept[key][part.offset : part.offset + values.numel()] = values.to(flat.device)
        return kept

    def _kept(self, group: int) -> Kept:
        return kept_state(self._inner, self._flats[group])

    def _part(self, parameter: Any) -> Part | None:
        if hasattr(parameter, "ds_id"):
            group, offset, count = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            return Part(group, offset, dist.get_rank(parameter.ds_process_group) * count, count)
        if (mapping := parameter._hp_mapping) is None:
            return None
        held, place = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Part(self._groups[id(parameter)], place.start, held.start, held.numel)

    def _local(self, parameter: nn.Parameter, part: Part | None, values: Tensor, key: str | None = None) -> Tensor:
        """This rank's elements out of flat `values`: the fp32 weights, or the state that `key` names."""
        if getattr(self._optimizer, "swap_optimizer", False):
            from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

            local: Tensor = (
                safe_get_local_fp32_param(parameter) if key is None else safe_get_local_optimizer_state(parameter, key)
            )
            return local
        return values.new_empty(0) if part is None else values[part.offset : part.offset + part.numel]

    def _whole(self, parameter: Any, part: Part | None, local: Tensor) -> Tensor:
        shape = shape_of(parameter)
        local = local.to(parameter.device)  # state kept in host memory travels over the device
        if hasattr(parameter, "ds_id"):
            ranks = dist.get_world_size(parameter.ds_process_group)
            joined = local.new_empty(ranks * local.numel())
            dist.all_gather_into_tensor(joined, local.contiguous(), group=parameter.ds_process_group)
            return joined[: parameter.ds_numel].view(shape)
        whole = torch.zeros(parameter.numel(), dtype=local.dtype, device=parameter.device)
        if part is not None:
            whole[part.start : part.start + part.numel] = local
        # Each element is on one rank and zero on the others, so adding bits as integers joins them unchanged.
        bits = whole.view(torch.int32) if whole.dtype.itemsize == 4 else whole
        dist.all_reduce(bits, group=parameter._dp_group)
        return whole.view(shape)


@contextmanager
def _swapped_in(optimizer: Any, group: int) -> Iterator[None]:
    """While inside, a group whose state lives on NVMe is in memory."""
    if not getattr(optimizer, "swap_optimizer", False) or not optimizer._swappable_optimizer_subgroup(group):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(group, set())
    yield
    optimizer._optimizer_states_and_gradient_swap_out(group, set())
