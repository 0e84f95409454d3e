"""`understudy train` stops on request with a checkpoint, and the same command goes on as if it had not stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import small_run
from understudy.checkpoint.store import CheckpointStore, verify_checkpoint

STEPS = 120
TRAIN = [sys.executable, "-m", "understudy", "train"]


def recipe(tmp_path: Path) -> dict[str, Any]:
    values = small_run.small_recipe(tmp_path)
    values["training"].update(max_steps=STEPS, deterministic=True)
    values["evaluation"] = {}
    values["data"].pop("eval")
    return values


def stopped(arguments: list[str], tmp_path: Path, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Runs until some more steps are logged, then asks it to stop."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    logged = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    command = subprocess.Popen(
        arguments,
        env=small_run.environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while command.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_bytes().splitlines()) > logged + 3:
            break
        time.sleep(0.02)
    command.send_signal(number)
    output, errors = command.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, command.returncode, output, errors)


def course(rows: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    return [(row["step"], row["loss"], row["learning_rate"]) for row in rows]


@pytest.mark.distributed
def test_a_stopped_run_goes_on_to_the_bit_and_under_another_strategy_within_rounding(tmp_path: Path) -> None:
    file = small_run.write(recipe(tmp_path), tmp_path)
    alone = tmp_path / "alone"
    done = small_run.understudy(["train", str(file), f"output_dir={alone}"], tmp_path)
    assert done.returncode == 0, done.stderr

    done = stopped([*TRAIN, str(file)], tmp_path, signal.SIGTERM)
    assert done.returncode == 75, done.stderr
    (saved,) = CheckpointStore(tmp_path / "run" / "checkpoints").committed()
    step = verify_checkpoint(saved).step
    assert 3 < step < STEPS
    assert done.stderr == (
        f"stopped by SIGTERM after step {step}; its checkpoint is {saved}. Run the same command again to go on.\n"
    )

    elsewhere = [f"output_dir={tmp_path}/other", "strategy=zero3", "cluster.processes=1"]
    done = small_run.understudy(["train", str(file), *elsewhere, f"checkpoint.resume={saved}"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"going on from {saved} (step {step})" in done.stdout

    done = stopped([*TRAIN, str(file)], tmp_path, signal.SIGUSR1)
    assert done.returncode in (0, 75), done.stderr
    if done.returncode == 75:
        done = small_run.understudy(["train", str(file)], tmp_path)
        assert done.returncode == 0, done.stderr

    expected = course(small_run.read_rows(alone))
    assert [row[0] for row in expected] == list(range(1, STEPS + 1))
    assert course(small_run.rows(tmp_path)) == expected
    for path in (alone / "model").glob("*.safetensors"):
        assert (tmp_path / "run" / "model" / path.name).read_bytes() == path.read_bytes()
    other = course(small_run.read_rows(tmp_path / "other"))
    assert [row[0] for row in other] == list(range(step + 1, STEPS + 1))
    for row, (_, loss, learning_rate) in zip(other, expected[step:]):
        # What rounding adds up to over some steps of a learning rate this high is no matter of resuming.
        if row[0] <= step + 5:
            assert row[1] == pytest.approx(loss, rel=1e-5)
        assert row[2] == learning_rate

    done = small_run.understudy(["train", str(file)], tmp_path)
    assert done.returncode == 2
    assert "holds a finished run" in done.stderr
