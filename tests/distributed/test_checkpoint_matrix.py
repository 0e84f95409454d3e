"""A checkpoint saved under one strategy and world size resumes under every other, whatever the optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.adapter_bases import ADAPTERS, FREEZE, Bases
from tests.distributed.checkpoint_matrix import OPTIMIZERS, STRATEGIES, Adapted, Matrix, Place


@pytest.mark.distributed
def test_weights_and_moments_are_bitwise_and_losses_go_on(tmp_path: Path) -> None:
    matrix = Matrix(tmp_path)
    matrix.save([Place(1, "ddp"), Place(2, "fsdp"), Place(2, "zero2"), Place(2, "zero3")])
    assert matrix.resume([Place(1, "ddp"), *(Place(2, strategy) for strategy in STRATEGIES)]) == []


@pytest.mark.distributed
def test_every_optimizer_and_precision_goes_on_to_the_bit(tmp_path: Path) -> None:
    places = [Place(2, strategy, optimizer) for strategy in ("ddp", "fsdp") for optimizer in OPTIMIZERS]
    places += [Place(2, "zero2", optimizer) for optimizer in ("adamw_8bit", "lion", "sgd")]
    places += [Place(2, "zero3", "adamw_8bit"), Place(2, "zero0", "adamw", "bf16")]
    places += [Place(2, strategy, "adamw", "bf16") for strategy in ("fsdp", "zero1", "zero3-offload")]
    places += [Place(2, strategy) for strategy in ("zero0", "fsdp-offload", "zero2-offload")]
    places += [Place(2, strategy, "adamw", "fp16") for strategy in ("ddp", "fsdp")]
    # Sizes at which ranks' parts of a parameter cut the blocks of 8-bit moments.
    matrix = Matrix(tmp_path, sizes={"hidden_size": 64, "intermediate_size": 100})
    matrix.save(places)
    assert matrix.resume(places) == []


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "quantized"), [("lora", True), ("pissa", False), ("freeze", False)])
def test_adapters_resume_under_another_strategy_to_the_bit(kind: str, quantized: bool, tmp_path: Path) -> None:
    bases = Bases(tmp_path / "bases")
    directory = None if kind == "freeze" else bases.adapter(kind, quantized=quantized)
    settings = FREEZE if kind == "freeze" else ADAPTERS[kind]
    adapted = Adapted(bases.directory(quantized=quantized), settings, directory)
    matrix = Matrix(tmp_path, adapted=adapted, taught=kind != "pissa")
    matrix.save([Place(2, "fsdp"), Place(2, "zero3")])
    assert matrix.resume([Place(1, "ddp"), *(Place(2, strategy) for strategy in ("fsdp", "zero2", "zero3"))]) == []


@pytest.mark.matrix
def test_every_strategy_at_every_size_resumes_from_every_other(tmp_path: Path) -> None:
    places = [Place(size, strategy) for size in (1, 2, 4) for strategy in STRATEGIES]
    matrix = Matrix(tmp_path, tied=False)
    matrix.save(places)
    assert matrix.resume(places) == []
