"""Which rank writes which tensor."""

from __future__ import annotations

from collections.abc import Mapping

from understudy.checkpoint.safetensors_writer import spec_bytes
from understudy.contracts import TensorSpec

__all__ = ["assign_owners"]


def assign_owners(layout: Mapping[str, TensorSpec], ranks: int) -> dict[str, int]:
    """The owner of each tensor, with bytes balanced over `ranks`: the largest first, each to the least loaded.

    A pure function of its arguments, so every rank knows it without asking. Within 4/3 of the best balance (Graham,
    1969).
    """
    loads = [0] * ranks
    owners: dict[str, int] = {}
    for name in sorted(layout, key=lambda name: (-spec_bytes(layout[name]), name)):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += spec_bytes(layout[name])
    return owners
