"""Reading and writing full weights through DeepSpeed's partitions (ZeRO 1–3), by its public helpers."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from understudy.contracts import LazyTensor

__all__ = ["link_in_partition_order", "partition_as_built", "read_flat", "set_weight", "shape_of", "whole_weight"]


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the whole, whether or not it is partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_weight(parameter: Any) -> Tensor:
    """A weight that is not trained, so that no optimizer has an fp32 one of it. A collective under ZeRO-3."""
    if not hasattr(parameter, "ds_id"):
        return cast(Tensor, parameter.detach())
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return cast(Tensor, parameter.detach().clone())


def link_in_partition_order(optimizer: Any) -> None:
    """Lets DeepSpeed's helpers find each weight in the ZeRO-1 or 2 `optimizer` where `round_robin_gradients` moved it.

    DeepSpeed 0.14.4 to 0.19.8 reorders parameters for that setting, partitions them in the new order and links them to
    their fp32 weights in the old one, so that reading or setting a weight reaches another's place. Stage 1 in bf16 has
    an optimizer of its own, which reorders nothing.
    """
    if not hasattr(optimizer, "round_robin_bit16_groups"):
        return
    own = optimizer.bit16_groups
    optimizer.bit16_groups = optimizer.round_robin_bit16_groups
    optimizer._link_all_hp_params()
    optimizer.bit16_groups = own


def set_weight(parameter: nn.Parameter, stored: LazyTensor) -> None:
    """Sets this rank's part of the weight that computes and, of one that is trained, of its fp32 master; under ZeRO-3
    only that part is read from `stored`. A collective for parameters that live on NVMe."""
    if not hasattr(parameter, "ds_id"):
        _set_whole(parameter, stored)
    elif getattr(parameter, "nvme_swapper", None) is not None:
        _set_swapped(parameter, stored)
    else:
        _set_partition(parameter, stored)


def _set_whole(parameter: nn.Parameter, stored: LazyTensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param

    whole = read_flat(stored, 0, parameter.numel()).view(parameter.shape).to(parameter.device)
    parameter.data.copy_(whole)
    if parameter.requires_grad:
        safe_set_full_fp32_param(parameter, whole)


def _set_partition(parameter: Any, stored: LazyTensor) -> None:
    from deepspeed.utils import safe_set_local_fp32_param

    partition: Tensor = parameter.ds_tensor
    start = torch.distributed.get_rank(parameter.ds_process_group) * partition.numel()
    held = read_flat(stored, start, start + partition.numel())
    # The last rank's part is padded so that all are equal in size.
    padded = held.new_zeros(partition.numel())
    padded[: held.numel()] = held
    partition.data.copy_(padded)
    if parameter.requires_grad:
        safe_set_local_fp32_param(parameter, padded.to(partition.device, torch.float32))
    if parameter.numel():  # small parameters are kept whole beside their partition
        parameter.data.copy_(read_flat(stored, 0, parameter.ds_numel).view(parameter.ds_shape))


def _set_swapped(parameter: Any, stored: LazyTensor) -> None:
    import deepspeed
    from deepspeed.utils import safe_set_local_fp32_param

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.data.copy_(read_flat(stored, 0, parameter.ds_numel).view(parameter.ds_shape))
    if not parameter.requires_grad:
        return
    size = parameter.ds_tensor.ds_numel
    start = torch.distributed.get_rank(parameter.ds_process_group) * size
    padded = torch.zeros(size, dtype=torch.float32)
    held = read_flat(stored, start, start + size)
    padded[: held.numel()] = held
    safe_set_local_fp32_param(parameter, padded)


def read_flat(stored: LazyTensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the row-major flattened tensor, as far as it goes, reading only the rows that hold
    them."""
    row_elements = math.prod(stored.shape[1:])
    stop = min(stop, stored.shape[0] * row_elements)
    if stop <= start:
        return torch.empty(0, dtype=stored.dtype)
    first_row, last_row = start // row_elements, -(-stop // row_elements)
    rows = stored[first_row:last_row].reshape(-1)
    return rows[start - first_row * row_elements : stop - first_row * row_elements]


def partition_as_built(module: nn.Module, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """Gives meta parameters memory and partitions them for ZeRO-3, one submodule at a time, so that a rank never holds
    more than one submodule whole. A collective."""
    import deepspeed

    fresh: dict[int, nn.Parameter] = {}
    swapper = None  # for parameters on NVMe: one, since each has gigabytes of buffers
    for child in _children_first(module):
        own = list(child.named_parameters(recurse=False))
        for name, parameter in own:
            if id(parameter) not in fresh:
                values = torch.zeros(parameter.shape, dtype=dtype, device=device)
                fresh[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            setattr(child, name, fresh[id(parameter)])
        for name, buffer in list(child.named_buffers(recurse=False)):
            setattr(child, name, buffer.to(device))
        if own:
            partitioned = deepspeed.zero.Init(
                module=child, config_dict_or_path=config, dtype=dtype, param_swapper=swapper
            )
            swapper = partitioned.param_swapper


def _children_first(module: nn.Module) -> list[nn.Module]:
    return list(reversed(list(module.modules())))
