"""DeepSpeed files that users arrive with run as they are, and train as the gradient contract says."""

from __future__ import annotations

import json
from pathlib import Path

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


def test_conformance_where_gradients_are_partitioned_round_robin(tmp_path: Path) -> None:
    """The setting reorders weights inside DeepSpeed; each must still be set, trained and read as itself."""
    file = tmp_path / "round_robin.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}))
    model = write_models(tmp_path / "models")[False]
    strategy = {"kind": "deepspeed", "config": str(file)}
    cases = {"round_robin": case(model, strategy, ADAMW, 4, max_grad_norm=0.5)}
    results = run_processes(WORKER, 2, tmp_path, {"cases": cases})
    assert_same_trajectory(results[0]["round_robin"], trajectory(model), LOSS_TOLERANCE, NORM_TOLERANCE)
    assert_same_weights(tmp_path / "round_robin.safetensors", trajectory(model), WEIGHT_TOLERANCE)
