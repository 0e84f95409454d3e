"""The gradient contract (P2) on adapters: every strategy trains each kind as peft does in fp64 in one process.

On a base in fp32, and on one of 4 bits, which in fp64 is the model of its dequantized weights. What is frozen has no
gradient and no moments, and the strategies that shard hold their share of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.adapter_bases import ADAPTERS, FREEZE, Bases
from tests.distributed.conformance import (
    ADAMW,
    LOSS_TOLERANCE,
    NORM_TOLERANCE,
    WEIGHT_TOLERANCE,
    WORKER,
    assert_same_trajectory,
    assert_same_weights,
    case,
)
from tests.distributed.processes import run_processes

pytestmark = pytest.mark.distributed

STRATEGIES = ("ddp", "fsdp", "fsdp-offload", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload")
IN_FULL = ("ddp", "fsdp", "zero2", "zero3")
"""The others differ from one of these in where optimizer state lives: they try one kind, whole and on 4 bits, and
what trains without any. All of it is `matrix`."""
ON_4_BITS = ("lora", "dora", "ia3", "vera", "llama_adapter", "prompt_tuning")
LOW_PRECISION_TOLERANCE = (1e-2, 5e-2)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def cases_of(strategy: str, kinds: Sequence[str], bases: Bases) -> dict[str, Any]:
    optimizer = ADAMW
    cases = {"freeze": case(bases.whole, strategy, optimizer, 4, recipe={"adapter": FREEZE}, max_grad_norm=0.5)}
    for kind in kinds:
        on_4_bits = kind in ON_4_BITS and (strategy in IN_FULL or kind == "lora")
        for quantized in (False, True) if on_4_bits else (False,):
            directory = bases.adapter(kind, quantized=quantized)
            cases[f"{kind}-nf4" if quantized else kind] = case(
                bases.directory(quantized=quantized),
                strategy,
                optimizer,
                4,
                adapter=directory,
                recipe={"adapter": ADAPTERS[kind]},
                max_grad_norm=0.5,
            )
    for kind in ("lora", "dora", "vera") if strategy in IN_FULL else ():
        quantized = kind != "vera"
        cases[f"{kind}-bf16"] = case(
            bases.directory(quantized=quantized),
            strategy,
            optimizer,
            3,
            adapter=bases.adapter(kind, quantized=quantized),
            recipe={"adapter": ADAPTERS[kind]},
            max_grad_norm=0.5,
            precision="bf16",
        )
    return cases


@pytest.mark.parametrize(
    ("strategy", "kinds"),
    [
        *((strategy, tuple(ADAPTERS) if strategy in IN_FULL else ("lora",)) for strategy in STRATEGIES),
        *(pytest.param(one, tuple(ADAPTERS), marks=pytest.mark.matrix) for one in STRATEGIES if one not in IN_FULL),
    ],
)
def test_every_adapter_trains_as_peft_does_in_one_process(
    strategy: str, kinds: Sequence[str], bases: Bases, tmp_path: Path
) -> None:
    results = run_processes(WORKER, 2, tmp_path, {"cases": cases_of(strategy, kinds, bases)})
    assert all(result == results[0] for result in results), "every rank sees the same losses and norms"
    for name, seen in results[0].items():
        kind, _, form = name.partition("-")
        solution = bases.solution(kind, quantized=form == "nf4" or (form == "bf16" and kind != "vera"))
        if form == "bf16":
            assert_same_trajectory(seen, solution, *LOW_PRECISION_TOLERANCE)
        else:
            assert_same_trajectory(seen, solution, LOSS_TOLERANCE, NORM_TOLERANCE)
            assert_same_weights(tmp_path / f"{name}.safetensors", solution, WEIGHT_TOLERANCE)
