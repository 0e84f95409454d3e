"""Counts the bytes of all tensors that exist in a process, real or simulated, and says what they were at the peak."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Alive", "LiveTensors", "Moment"]

_NO_END = 2**62
_HELD_BY_CALLS = 4
"""References to a tensor from the calls between autograd, which holds one, and an operator seen by a mode."""
_NUMBER = re.compile(r"(?<=[ .])\d+(?=\.|$)")
"""Of a layer, in a module's name or a mark."""


@dataclass(frozen=True)
class Moment:
    """A stretch of time, from its mark to the next one."""

    name: str
    bytes_at_start: int
    peak_bytes: int
    peak_time: int


@dataclass(frozen=True)
class Alive:
    """Tensors that existed at one time and came to be alike."""

    born: str
    """The mark under which they were made, numbers of layers left out."""
    backward: bool
    """By a backward pass."""
    module: str
    """In whose forward pass, numbers of layers left out; empty outside of any."""
    operator: str
    count: int
    bytes: int


@dataclass
class _Life:
    """Of a storage while it has one size. Times count the events seen."""

    size: int
    begins: int
    ends: int
    mark: str
    backward: bool
    module: str
    operator: str


class LiveTensors(TorchDispatchMode):
    """Inside, every storage that an operator gives out is counted from then until nothing refers to it any more; one
    that is resized counts with its new size.

    Tensors on the meta device have no memory and do not count. Of a DTensor the local part does. What libraries take
    without PyTorch's operators (gloo's buffers, DeepSpeed's pinned memory) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self._time = 0
        self._lives: list[_Life] = []
        self._alive: dict[int, tuple[_Life, weakref.ref[Any]]] = {}
        self._moments: list[Moment] = []
        self._mark = "before"
        self._at_start = self._peak = self._peak_time = 0
        self._modules: list[str] = []
        self._names: dict[int, str] = {}
        self._units: dict[int, str] = {}

    def mark(self, name: str) -> None:
        """A new moment begins, called `name`."""
        self._moments.append(Moment(self._mark, self._at_start, self._peak, self._peak_time))
        self._mark, self._at_start = name, self.now
        self._peak, self._peak_time = self.now, self._time

    @property
    def moments(self) -> list[Moment]:
        """Those so far, the present one included."""
        return [*self._moments, Moment(self._mark, self._at_start, self._peak, self._peak_time)]

    def alive_at(self, time: int) -> list[Alive]:
        """What existed then, the largest first."""
        groups: dict[tuple[str, bool, str, str], list[int]] = {}
        for life in self._lives:
            if life.begins <= time < life.ends:
                groups.setdefault((_NUMBER.sub("*", life.mark), life.backward, life.module, life.operator), []).append(
                    life.size
                )
        found = [Alive(*key, len(sizes), sum(sizes)) for key, sizes in groups.items()]
        return sorted(found, key=lambda one: -one.bytes)

    @contextmanager
    def watching(self, module: nn.Module, units: Mapping[nn.Module, str]) -> Iterator[None]:
        """Notes of each tensor in the forward pass of which part of `module` it is made, and marks when one of `units`
        goes forward, and when backward, under its name there."""
        self._names = {id(part): name for name, part in module.named_modules()}
        self._units = {id(unit): name for unit, name in units.items()}
        hooks = [
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if id(module) in self._units and not _in_backward():
            self.mark(f"forward {self._units[id(module)]}")
        self._modules.append(self._names.get(id(module), ""))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._modules.pop()
        first = output[0] if isinstance(output, tuple) else output
        if id(module) in self._units and not _in_backward() and isinstance(first, Tensor) and first.grad_fn is not None:
            name = f"backward {self._units[id(module)]}"
            first.grad_fn.register_prehook(lambda gradients: self.mark(name))

    def __enter__(self) -> LiveTensors:
        self._resize = torch.UntypedStorage.resize_
        setattr(torch.UntypedStorage, "resize_", _noting(self._resize, self._resized))  # noqa: B010  # FSDP2's way
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)  # type: ignore[no-untyped-call]
        setattr(torch.UntypedStorage, "resize_", self._resize)  # noqa: B010

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # its local part comes by itself
        if _sums_gradients(function, args):
            return args[0].add_(args[1])
        out = function(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._seen(leaf, function)
        return out

    def _seen(self, tensor: Tensor, function: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        module = next((name for name in reversed(self._modules) if name), "")
        self._begin(key, storage, function.overloadpacket.__name__, _NUMBER.sub("*", module))

    def _begin(self, key: int, storage: torch.UntypedStorage, operator: str, module: str) -> None:
        self._time += 1
        size = storage.nbytes()
        life = _Life(size, self._time, _NO_END, self._mark, _in_backward(), module, operator)
        self._lives.append(life)
        self._alive[key] = (life, weakref.ref(storage, lambda _: self._end(key)))
        self.now += size
        if self.now > self._peak:
            self._peak, self._peak_time = self.now, self._time

    def _end(self, key: int) -> None:
        self._time += 1
        life, _ = self._alive.pop(key)
        life.ends = self._time
        self.now -= life.size

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            life, _ = self._alive[key]
            self._end(key)
            self._begin(key, storage, life.operator, life.module)


def _sums_gradients(function: Any, args: Any) -> bool:
    """Whether autograd adds up two gradients of one tensor: into the first, if nobody else holds it, but under a
    dispatch mode such as this one into a third."""
    if function is not torch.ops.aten.add.Tensor or not _in_backward():
        return False
    first, second = args
    same = isinstance(second, Tensor) and first.shape == second.shape and first.dtype == second.dtype
    return same and first.numel() > 1 and first._use_count() <= _HELD_BY_CALLS


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _noting(
    resize: Callable[[torch.UntypedStorage, int], Any], noted: Callable[[torch.UntypedStorage], None]
) -> Callable[[torch.UntypedStorage, int], Any]:
    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        noted(storage)
        return result

    return resize_
