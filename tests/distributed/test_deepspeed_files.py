"""DeepSpeed files that users arrive with run as they are, and train as the gradient contract says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conformance import (
    ADAMW,
    LOSS_TOLERANCE,
    NORM_TOLERANCE,
    WEIGHT_TOLERANCE,
    WORKER,
    assert_same_trajectory,
    assert_same_weights,
    case,
    trajectory,
    write_models,
)
from tests.distributed.processes import ROOT, run_processes

pytestmark = pytest.mark.distributed

FOREIGN = ROOT.parent / "shared" / "foreign"
NAMES = ("ds_z0_config", "ds_z2_config", "ds_z2_offload_config", "ds_z3_config", "ds_z3_offload_config")


def test_each_file_trains_as_one_process_does(tmp_path: Path) -> None:
    if not FOREIGN.is_dir():
        pytest.skip(f"{FOREIGN} is not here")
    model = write_models(tmp_path / "models")[True]
    cases = {
        name: case(model, {"kind": "deepspeed", "config": str(FOREIGN / f"{name}.json")}, ADAMW, 4, max_grad_norm=0.5)
        for name in NAMES
    }
    results = run_processes(WORKER, 2, tmp_path, {"cases": cases})
    assert results[0] == results[1], "every rank sees the same losses and norms"
    for name in NAMES:
        assert_same_trajectory(results[0][name], trajectory(model), LOSS_TOLERANCE, NORM_TOLERANCE)
        assert_same_weights(tmp_path / f"{name}.safetensors", trajectory(model), WEIGHT_TOLERANCE)


def test_conformance_of_what_reorders_or_cuts_up_what_is_sent(tmp_path: Path) -> None:
    """Partitioning round robin reorders weights inside DeepSpeed; each must still be set, trained and read as itself. A
    bucket smaller than a weight, and small sizes of all that stage 3 fetches and keeps, change no result."""
    pieces = {"reduce_bucket_size": 500, "allgather_bucket_size": 400}
    ahead = {"stage3_prefetch_bucket_size": 300, "stage3_max_live_parameters": 900, "stage3_max_reuse_distance": 900}
    files: dict[str, dict[str, Any]] = {
        "round_robin": {"stage": 2, "round_robin_gradients": True},
        "zero2_in_pieces": {"stage": 2, **pieces},
        "zero3_in_pieces": {"stage": 3, **pieces, **ahead},
    }
    model = write_models(tmp_path / "models")[False]
    cases: dict[str, Any] = {}
    for name, zero in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
        strategy = {"kind": "deepspeed", "config": str(tmp_path / f"{name}.json")}
        cases[name] = case(model, strategy, ADAMW, 4, max_grad_norm=0.5)
    for preset in ("zero2", "zero3"):
        small: dict[str, Any] = {"kind": "deepspeed", "stage": int(preset[-1]), "buckets": "small"}
        cases[f"{preset}_small"] = case(model, small, ADAMW, 4, max_grad_norm=0.5)
    results = run_processes(WORKER, 2, tmp_path, {"cases": cases})
    for name in cases:
        assert_same_trajectory(results[0][name], trajectory(model), LOSS_TOLERANCE, NORM_TOLERANCE)
        assert_same_weights(tmp_path / f"{name}.safetensors", trajectory(model), WEIGHT_TOLERANCE)
