"""Accelerators and links as data, each entry with its source. Imports no torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from understudy.recipe.sizes import bytes_of

__all__ = ["Accelerator", "Link", "accelerators", "links"]

Api = Literal["cuda", "npu", "cpu"]


@dataclass(frozen=True)
class Link:
    """What carries collectives; figures of one device, one way."""

    name: str
    bandwidth: float
    """Bytes a second, at most."""
    efficiency: float
    """Share of it that large collectives reach."""
    latency: float
    """Seconds of one collective, however small."""
    source: str
    between_hosts: bool = False

    @property
    def reached(self) -> float:
        """Bytes a second that large collectives get."""
        return self.bandwidth * self.efficiency


@dataclass(frozen=True)
class Accelerator:
    """One device, as one process has it."""

    name: str
    api: Api
    """Which of PyTorch's devices it is; AMD's answer to cuda too."""
    capability: float
    """CUDA's compute capability, which decides which attention kernels there are; 0 elsewhere."""
    device_bytes: int
    usable_bytes: int
    """Of them, what programs can have."""
    bf16: float
    """Operations a second of dense matrix products; 0 where there is no such unit."""
    fp16: float
    fp32: float
    memory_bandwidth: float
    """Bytes a second."""
    link: Link
    """Between the devices of a host."""
    host_link: Link
    """To the host's memory."""
    context_bytes: int
    """What a process holds outside its allocator."""
    matmul: float
    """Share of the dense rate that matrix products reach in training."""
    source: str


@cache
def links() -> dict[str, Link]:
    return {name: Link(name=name, **values) for name, values in _catalogue()["links"].items()}


@cache
def accelerators() -> dict[str, Accelerator]:
    return {name: _accelerator(name, values) for name, values in _catalogue()["accelerators"].items()}


def _accelerator(name: str, values: dict[str, Any]) -> Accelerator:
    sizes = {key: bytes_of(values[key]) for key in ("device_bytes", "usable_bytes", "context_bytes")}
    ends = {key: links()[values[key]] for key in ("link", "host_link")}
    return Accelerator(name=name, **{**values, **sizes, **ends})


@cache
def _catalogue() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("catalogue.toml").read_text(encoding="utf-8")
    values: dict[str, Any] = tomllib.loads(text)
    return values
