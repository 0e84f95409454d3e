"""Cases for the conformance worker, and what their results are compared with: transformers in fp64 in one process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import scenario

WORKER = Path(__file__).with_name("conformance_worker.py")
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4
WEIGHT_TOLERANCE = 2e-4
"""Of weights that four steps of ADAMW moved by up to 0.04."""

ADAMW = {"kind": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1}


def case(
    model: Path,
    strategy: Any,
    optimizer: dict[str, Any],
    steps: int,
    *,
    poisoned_steps: int = 0,
    count_reads: bool = False,
    adapter: Path | None = None,
    recipe: dict[str, Any] | None = None,
    teachers: list[dict[str, Any]] | None = None,
    chunk_rows: int | None = None,
    **training: Any,
) -> dict[str, Any]:
    """`adapter` is a directory to begin with, `recipe` what the recipe says besides, `teachers` where they are if the
    recipe does not say it all; `chunk_rows` supervised positions, or all at once, are in a chunk of the head."""
    parallel = {"replicate": 2} if isinstance(strategy, dict) and strategy.get("sharding") == "hybrid_shard" else {}
    values = {
        "name": "conformance",
        "output_dir": "unused",
        "model": {"path": str(model)},
        "data": {"train": [{"path": "unused"}]},
        "strategy": strategy,
        "optimizer": optimizer,
        "training": {"precision": "fp32", "max_grad_norm": None, "activation_checkpointing": "none", **training},
        "parallel": parallel,
        **(recipe or {}),
    }
    return {
        "recipe": values,
        "model": str(model),
        "steps": steps,
        "poisoned_steps": poisoned_steps,
        "count_reads": count_reads,
        "adapter": None if adapter is None else str(adapter),
        "teachers": teachers,
        "chunk_rows": chunk_rows,
    }


def write_models(root: Path) -> dict[bool, Path]:
    """A model's directory by whether its head is tied to its embedding."""
    directories = {tied: root / f"tied-{tied}" for tied in (False, True)}
    for tied, directory in directories.items():
        scenario.write_model(directory, tied=tied)
    return directories


@cache
def trajectory(directory: Path) -> scenario.Solution:
    """Four steps of ADAMW, clipped to 0.5."""
    return scenario.solve(directory, steps=4, learning_rate=1e-2, max_norm=0.5, optimizer="adamw", decay=0.1)


def assert_same_trajectory(seen: dict[str, Any], solution: scenario.Solution, loss: float, norm: float) -> None:
    steps = len(seen["losses"])
    assert seen["losses"] == pytest.approx(solution.losses[:steps], rel=loss)
    assert seen["norms"] == pytest.approx(solution.norms[:steps], rel=norm)
    if steps == len(solution.losses):
        assert seen["evaluation"] == pytest.approx(solution.evaluation, rel=loss)


def assert_same_weights(file: Path, solution: scenario.Solution, tolerance: float) -> None:
    weights = load_file(file)
    assert weights.keys() == solution.weights.keys()
    for name, expected in solution.weights.items():
        torch.testing.assert_close(
            weights[name].double(), expected, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
