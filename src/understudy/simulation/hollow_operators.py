"""DeepSpeed without its compiled operators: they read memory that simulated tensors have not, and take a minute to
compile."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

__all__ = ["hollow_operators"]


class _Arithmetic:
    """In place of the optimizer for host memory: it makes nothing and updates nothing."""

    def create_adam(self, *settings: object) -> None: ...

    def adam_update(self, *tensors: object) -> None: ...

    def destroy_adam(self, number: int) -> None: ...


class _Builder:
    def load(self) -> _Arithmetic:
        return _Arithmetic()


@contextmanager
def hollow_operators() -> Iterator[None]:
    """Inside, DeepSpeed compiles nothing and does without operators; `DeepSpeedCPUAdam` makes its state and leaves all
    values as they are."""
    if find_spec("deepspeed") is None:
        yield
        return
    from understudy.strategies.deepspeed import import_deepspeed

    deepspeed = import_deepspeed()
    accelerator = deepspeed.accelerator.get_accelerator()
    module = importlib.import_module("deepspeed.ops.adam.cpu_adam")
    builder = module.CPUAdamBuilder
    setattr(module, "CPUAdamBuilder", _Builder)  # noqa: B010
    accelerator.create_op_builder = lambda name: None  # as one answers that does not have the operator
    try:
        yield
    finally:
        del accelerator.create_op_builder
        setattr(module, "CPUAdamBuilder", builder)  # noqa: B010
