"""`understudy train` on one device, in bf16."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.distributed.small_run import check_model, rows, run, small_recipe, write
from understudy.devices.device import Device

pytestmark = pytest.mark.device


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_recipe_becomes_a_model_that_loads_and_answers(device: Device, strategy: str, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path) | {"strategy": strategy, "cluster": {"processes": 1}}
    recipe["training"]["precision"] = "bf16"
    done = run([sys.executable, "-m", "understudy", "train", str(write(recipe, tmp_path))], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "reloaded with transformers" in done.stdout
    check_model(tmp_path / "run" / "model", dtype=device.compute_dtypes[0])
    trained = [row for row in rows(tmp_path) if "loss" in row]
    assert trained[-1]["loss"] < trained[0]["loss"] / 3
    assert all(row["memory_peak_bytes"] > 0 for row in trained)
