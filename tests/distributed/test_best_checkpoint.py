"""`checkpoint.keep_best` keeps the checkpoint with the lowest evaluation loss beside the newest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import small_run
from understudy.checkpoint.store import CheckpointStore, step_of, verify_checkpoint


@pytest.mark.distributed
def test_the_lowest_evaluation_loss_is_kept_beside_the_newest(tmp_path: Path) -> None:
    recipe = small_run.small_recipe(tmp_path)
    # It learns in the first half, and is driven away again in the second.
    recipe["training"]["max_steps"] = 30
    recipe["optimizer"] = {"learning_rate": 0.5}
    recipe["schedule"] = {"kind": "constant", "warmup_ratio": 0.9}
    recipe["checkpoint"] = {"every": 5, "keep": 1, "keep_best": True}
    recipe["evaluation"] = {}
    recipe["cluster"]["processes"] = 1
    file = small_run.write(recipe, tmp_path)

    done = small_run.understudy(["train", str(file)], tmp_path)

    assert done.returncode == 0, done.stderr
    losses = {row["step"]: row["eval_loss"] for row in small_run.rows(tmp_path) if "eval_loss" in row}
    assert sorted(losses) == [5, 10, 15, 20, 25, 30], "each checkpoint is evaluated first"
    best = min(losses, key=lambda step: losses[step])
    assert best < 30, "a recipe whose last step is its best tests nothing"
    kept = CheckpointStore(tmp_path / "run" / "checkpoints").committed()
    assert [step_of(path) for path in kept] == [30, best]
    assert verify_checkpoint(kept[1]).eval_loss == losses[best]
