"""Bare strings that stand for a mapping with `kind`, such as `strategy: zero3-offload`. Imports no torch."""

from __future__ import annotations

from typing import Any

__all__ = ["STRATEGY_PRESETS", "expand_kind", "expand_strategy"]

STRATEGY_PRESETS: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "fsdp-offload": {"kind": "fsdp", "offload": True},
    "zero0": {"kind": "deepspeed", "stage": 0},
    "zero1": {"kind": "deepspeed", "stage": 1},
    "zero2": {"kind": "deepspeed", "stage": 2},
    "zero2-offload": {"kind": "deepspeed", "stage": 2, "offload_optimizer": "cpu"},
    "zero3": {"kind": "deepspeed", "stage": 3},
    "zero3-offload": {"kind": "deepspeed", "stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
}


def expand_kind(value: Any) -> Any:
    """`cosine` becomes `{kind: cosine}`; anything else is left for the schema to judge."""
    return {"kind": value} if isinstance(value, str) else value


def expand_strategy(value: Any) -> Any:
    """A preset's name becomes its mapping; `auto` and unknown names are left for the schema to judge."""
    return dict(STRATEGY_PRESETS[value]) if isinstance(value, str) and value in STRATEGY_PRESETS else value
