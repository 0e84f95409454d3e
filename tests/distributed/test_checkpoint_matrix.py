"""A checkpoint saved under one strategy and world size resumes under every other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.checkpoint_matrix import STRATEGIES, Matrix, Place

ADAMW = {"kind": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1}


@pytest.mark.distributed
def test_weights_and_moments_are_bitwise_and_losses_go_on(tmp_path: Path) -> None:
    matrix = Matrix(tmp_path, optimizer=ADAMW)
    matrix.save([Place(1, "ddp"), Place(2, "fsdp"), Place(2, "zero2"), Place(2, "zero3")])
    assert matrix.resume([Place(1, "ddp"), *(Place(2, strategy) for strategy in STRATEGIES)]) == []


@pytest.mark.matrix
def test_every_strategy_at_every_size_resumes_from_every_other(tmp_path: Path) -> None:
    places = [Place(size, strategy) for size in (1, 2, 4) for strategy in STRATEGIES]
    matrix = Matrix(tmp_path, optimizer=ADAMW, tied=False)
    matrix.save(places)
    assert matrix.resume(places) == []
