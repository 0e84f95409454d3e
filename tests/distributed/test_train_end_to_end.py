"""`understudy train` from a recipe to a model that plain transformers loads, with real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.small_run import check_model, environment, rows, run, small_recipe, write

pytestmark = pytest.mark.distributed

COMMAND = [sys.executable, "-m", "understudy"]


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return small_recipe(tmp_path)


def test_a_recipe_becomes_a_model_that_loads_and_answers(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["strategy"] = "auto"
    arguments = [*COMMAND, "train", str(write(recipe, tmp_path))]
    done = run(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert "reloaded with transformers" in done.stdout
    check_model(tmp_path / "run" / "model")

    # Eight examples of at most 16 tokens are a step of two processes.
    assert re.search(
        r"^auto: ddp, micro-batches of 64 tokens, no activation checkpointing: the fastest that fits .* planned, .*$",
        done.stdout,
        re.MULTILINE,
    )
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert resolved["strategy"] == {"kind": "ddp"}
    assert (resolved["training"]["micro_batch_tokens"], resolved["training"]["activation_checkpointing"]) == (
        64,
        "none",
    )
    last = [row for row in rows(tmp_path) if "loss" in row][-1]
    planned, measured = last["memory_predicted_bytes"], last["memory_peak_bytes"]
    assert 0.7 <= measured / planned <= 1.4
    line = rf"^memory: planned {planned / 2**30:.2f} GiB, measured \d\.\d\d GiB a process \(\d+%\)$"
    assert re.search(line, done.stdout, re.MULTILINE)

    trained = [row for row in rows(tmp_path) if "loss" in row]
    evaluated = [row for row in rows(tmp_path) if "eval_loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 61))
    # A conversation is <user> word <end> <assistant> word <end>; what the assistant says is supervised, its end too.
    assert {(row["tokens"], row["supervised_tokens"]) for row in trained} == {(48, 16)}
    assert trained[-1]["loss"] < trained[0]["loss"] / 3
    assert [row["step"] for row in evaluated] == [0, 60]
    assert (evaluated[0]["eval_exact_match"], evaluated[1]["eval_exact_match"]) == (0.0, 1.0)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "recipe.yaml",
        "metrics.jsonl",
        "logs",
        "tensorboard",
        "model",
    }
    assert {path.name for path in (tmp_path / "run" / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}

    again = run(arguments, tmp_path)
    assert again.returncode == 2
    assert re.fullmatch(r"error: .*recipe\.yaml:1: .* holds a finished run; .*--overwrite.*\n", again.stderr)


def test_a_run_that_diverges_ends_with_status_3_and_says_so(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["optimizer"] = {"kind": "sgd", "learning_rate": 1.0e38}
    recipe["training"]["max_grad_norm"] = None
    recipe["evaluation"] = {}
    done = run([*COMMAND, "train", str(write(recipe, tmp_path))], tmp_path)
    assert done.returncode == 3
    assert re.fullmatch(r"error: the loss or its gradient was not finite on 6 steps in a row, .*\n", done.stderr)
    assert [row["grad_norm"] for row in rows(tmp_path)[-6:]] == [None] * 6
    assert not (tmp_path / "run" / "model").exists()


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def rank_of(process: int) -> str | None:
    variables = Path(f"/proc/{process}/environ").read_text().split("\0")
    return next((entry.partition("=")[2] for entry in variables if entry.startswith("RANK=")), None)


def test_a_killed_process_ends_the_run_with_status_5_naming_it(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["training"]["max_steps"] = 100_000
    recipe["evaluation"] = {}
    arguments = [*COMMAND, "train", str(write(recipe, tmp_path))]
    with subprocess.Popen(arguments, env=environment(tmp_path), stderr=subprocess.PIPE, text=True) as launcher:
        while not (tmp_path / "run" / "metrics.jsonl").exists() or len(rows(tmp_path)) < 3:
            assert launcher.poll() is None
            time.sleep(0.1)
        workers = {rank_of(child): child for child in children(launcher.pid)}
        os.kill(workers["1"], signal.SIGKILL)
        _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 5
    assert re.search(r"^error: rank 1 on \S+ was killed by SIGKILL", errors)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers.values())
