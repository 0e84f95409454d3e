"""Bytes that an optimizer keeps and needs, by the files of `optim.optimizers`."""

from __future__ import annotations

import math
from collections.abc import Callable

from understudy.plan.memory.setting import FP32, Setting
from understudy.plan.network import Held
from understudy.recipe.schema import Optimizer

__all__ = ["kept_bytes", "moment_bytes", "step_scratch"]

_SMALLEST_8BIT = 4096
_SCALES = 2 * FP32 / 256
"""Bytes of both moments' scales an element."""


def kept_bytes(optimizer: Optimizer, held: Held, local: int, itemsize: int) -> int:
    """What is kept of a parameter, `local` elements of which are here, in a dtype of `itemsize` bytes."""
    kind = optimizer.kind
    compensation = local * itemsize if itemsize < FP32 else 0
    if kind == "adamw_bf16":
        return 2 * local * itemsize + compensation
    if kind == "adamw_8bit" and held.numel >= _SMALLEST_8BIT:
        return math.ceil(local * (2 + _SCALES))
    if kind == "adamw_8bit":
        return 2 * local * FP32
    if kind == "adafactor":
        return _factored(held, local)
    if kind == "lion":
        return local * itemsize + compensation
    if kind == "muon" and held.hidden_matrix:
        return local * itemsize
    if kind == "sgd":
        return (local * itemsize if optimizer.momentum else 0) + compensation
    return 2 * local * itemsize  # adamw, and muon's AdamW


def _factored(held: Held, local: int) -> int:
    if len(held.shape) < 2:
        return local * FP32
    columns = held.shape[-1]
    return FP32 * (local // columns + held.numel // math.prod(held.shape[-2:]) * columns)


def moment_bytes(setting: Setting, local: Callable[[Held], int], itemsize: int) -> int:
    """What is kept of all that is trained; `local` says how many elements of a parameter are here."""
    return sum(
        kept_bytes(setting.optimizer, held, local(held), itemsize) * count
        for held, count in setting.network.parameters()
        if held.trained
    )


def step_scratch(setting: Setting, local: Callable[[Held], int]) -> int:
    """What a step needs beside it, at the parameter that needs most: fused AdamW nothing, the optimizers that are
    written out some fp32 copies of a parameter, Muon a whole matrix in fp32 and a few in bf16."""
    kind = setting.optimizer.kind
    if kind in ("adamw", "adamw_8bit"):
        return 0
    trained = [held for held, _ in setting.network.parameters() if held.trained]
    if kind == "muon":
        matrices = [held.numel for held in trained if held.hidden_matrix]
        return max(matrices, default=0) * (2 * FP32 + 4 * 2)
    copies = {"adafactor": 4, "lion": 3, "sgd": 2, "adamw_bf16": 5}[kind]
    return max((local(held) for held in trained), default=0) * FP32 * copies
