"""DeepSpeed's optimizer for host memory without its arithmetic, which reads memory that simulated tensors have not."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

__all__ = ["hollow_host_optimizer"]


class _Arithmetic:
    """In place of the compiled operator: it makes nothing and updates nothing."""

    def create_adam(self, *settings: object) -> None: ...

    def adam_update(self, *tensors: object) -> None: ...

    def destroy_adam(self, number: int) -> None: ...


class _Builder:
    def load(self) -> _Arithmetic:
        return _Arithmetic()


@contextmanager
def hollow_host_optimizer() -> Iterator[None]:
    """Inside, `DeepSpeedCPUAdam` makes its state and leaves all values as they are."""
    if find_spec("deepspeed") is None:
        yield
        return
    from understudy.strategies.deepspeed import import_deepspeed

    import_deepspeed()
    module = importlib.import_module("deepspeed.ops.adam.cpu_adam")
    builder = module.CPUAdamBuilder
    setattr(module, "CPUAdamBuilder", _Builder)  # noqa: B010
    try:
        yield
    finally:
        setattr(module, "CPUAdamBuilder", builder)  # noqa: B010
