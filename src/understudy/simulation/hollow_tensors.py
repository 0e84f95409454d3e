"""Tensors that have shapes and no memory, and programs that read numbers out of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HollowTensors", "hollow_parameters"]

_INDICES = (torch.int64, torch.int32, torch.bool)
_aten = torch.ops.aten


class HollowTensors(TorchDispatchMode):
    """Inside, tensors are PyTorch's fake ones, but for two kinds that programs look into: what is made of indices alone
    (tokens, labels, offsets), and single numbers (a norm, a flag that something is not finite).

    Indices are computed as ever. A number that would be read out of a fake tensor is zero, and `all` of it true: so no
    loss and no gradient is infinite, and an optimizer steps.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> HollowTensors:
        self.fake.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)  # type: ignore[no-untyped-call]
        self.fake.__exit__(*failure)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # its local part comes by itself
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if function.namespace != "c10d" and _is_real(function, args, kwargs, tensors):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function in (_aten._local_scalar_dense.default, _aten.is_nonzero.default):
            return _zero(tensors[0].dtype)
        if function is _aten.equal.default:
            return True
        if function is _aten.slice.Tensor and isinstance(tensors[0], FakeTensor):
            return self._slice(tensors[0], args, kwargs)
        out = function(*args, **kwargs)
        if function._schema.is_mutable:
            return out
        whole = torch.ones if function is _aten.all.default else torch.zeros
        return pytree.tree_map(lambda leaf: self._number(leaf, whole), out)

    def _slice(self, tensor: FakeTensor, args: Any, kwargs: Any) -> FakeTensor:
        """As `FakeTensorMode` would, without what makes that take a millisecond: DeepSpeed cuts each gradient into as
        many slices as there are processes."""
        with in_kernel_invocation_manager(self.fake):
            cut = _aten.slice.Tensor(*args, **kwargs)
        return FakeTensor(self.fake, cut, tensor.fake_device)

    def _number(self, leaf: Any, filled: Any) -> Any:
        """A real one in place of a fake tensor that is one number and no part of a larger one."""
        if not isinstance(leaf, FakeTensor) or leaf.numel() != 1 or leaf.device.type == "meta":
            return leaf
        if leaf.untyped_storage().nbytes() != leaf.element_size():
            return leaf
        with unset_fake_temporarily():
            return filled(leaf.shape, dtype=leaf.dtype, device=leaf.device)


def _is_real(function: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> bool:
    if tensors:
        return not any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors)
    # What is made of nothing is an index, or else room for weights and such.
    filled = function.overloadpacket in (_aten.full, _aten.arange) and all(type(one) is not float for one in args)
    return filled or kwargs.get("dtype") in _INDICES


def _zero(dtype: torch.dtype) -> bool | int | float:
    return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0


def hollow_parameters(module: nn.Module, fake: FakeTensorMode) -> None:
    """Makes each parameter of `module`, on the meta device, one of `fake`'s, in place and once where tied."""
    made: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            if id(parameter) not in made:
                values = fake.from_tensor(parameter.detach())
                made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            child._parameters[name] = made[id(parameter)]
