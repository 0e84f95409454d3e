"""Runs that are out of memory: they go on with smaller micro-batches to the same losses, or say what would fit."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.processes import ROOT
from tests.distributed.small_run import WORDS, environment, read_rows, small_recipe, write, write_tokenizer

pytestmark = pytest.mark.distributed

HOST = socket.gethostname()
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 256}


def said(i: int) -> dict[str, Any]:
    answer = " ".join(WORDS[(i + j * j) % 8] for j in range(225 + i))
    return {"messages": [{"role": "user", "content": WORDS[i % 8]}, {"role": "assistant", "content": answer}]}


def wide_recipe(tmp_path: Path) -> dict[str, Any]:
    """A step of four examples of about 230 tokens a process, whose feed-forward layers keep half a megabyte of
    activations a token and layer, and, to take less time, one of an example a process."""
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(said(i)) + "\n" for i in range(10)))
    config = {"model_type": "llama", "vocab_size": 16, "intermediate_size": 32768, "num_hidden_layers": 4, **SIZES}
    return {
        "model": {"tokenizer": str(tmp_path / "tokenizer"), "init": "random", "config": config},
        "data": {"train": [{"path": str(tmp_path / "data.jsonl")}], "max_length": 240, "num_workers": 1},
        "optimizer": {"learning_rate": 1.0e-3},
        "training": {
            "epochs": 1,
            "global_batch_size": 8,
            "precision": "fp32",
            "micro_batch_tokens": 4096,
            "activation_checkpointing": "none",
        },
        "logging": {"sinks": ["jsonl"]},
        "cluster": {"processes": 2},
    }


def train(recipe: Path, *runs: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """`understudy train` of `recipe` with the overrides of one run after the other."""
    command = [sys.executable, "-m", "tests.distributed.forked_train", str(recipe), *map(json.dumps, runs)]
    variables = {**environment(recipe.parent), "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith("out of memory: ")]


def test_a_run_whose_first_micro_batch_does_not_fit_trains_to_the_end_with_the_same_losses(tmp_path: Path) -> None:
    recipe = write(wide_recipe(tmp_path), tmp_path)
    strategies = ("ddp", "fsdp", "zero2", "zero3")
    runs = [["strategy=ddp", f"output_dir={tmp_path / 'unlimited'}"]]
    runs += [[f"strategy={name}", f"output_dir={tmp_path / name}", "training.memory_limit=2GiB"] for name in strategies]
    done = train(recipe, *runs)
    assert done.stdout.endswith("statuses [0, 0, 0, 0, 0]\n"), f"{done.stdout}{done.stderr}"
    assert len(told(done)) == len(strategies)
    assert all("in place of micro-batches of at most 4,096 tokens (restart 1 of 4)" in line for line in told(done))
    expected = [row["loss"] for row in read_rows(tmp_path / "unlimited") if "loss" in row]
    for strategy in strategies:
        rows = [row for row in read_rows(tmp_path / strategy) if "loss" in row]
        assert [row["step"] for row in rows] == [1, 2]
        assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)
        in_effect = yaml.safe_load((tmp_path / strategy / "recipe.yaml").read_text())["training"]["micro_batch_tokens"]
        assert 232 <= in_effect < 600


def test_a_run_for_which_nothing_smaller_is_left_says_what_would_fit(tmp_path: Path) -> None:
    """Weights, gradients and moments of 30 million parameters on each process are too much, and half of them not."""
    values = wide_recipe(tmp_path)
    values["model"]["config"] |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    recipe = write(values, tmp_path)
    overrides = ["strategy=ddp", "training.micro_batch_tokens=240", "training.memory_limit=800MiB"]
    refused = train(recipe, [*overrides, f"output_dir={tmp_path / 'run'}"])
    assert refused.stdout.endswith("statuses [4]\n"), f"{refused.stdout}{refused.stderr}"
    assert refused.stderr.startswith("error: out of memory: rank ")
    assert "with strategy ddp and micro-batches of at most 240 tokens" in refused.stderr
    assert "would fit: strategy=" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert told(refused) == []


def test_a_rank_out_of_memory_costs_no_more_than_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    """Rank 1 alone runs out in step 3, and as it saves the checkpoint of step 4 it aborts."""
    values = small_recipe(tmp_path)
    values["training"] |= {"max_steps": 5, "micro_batch_tokens": 64}
    values["checkpoint"] = {"every": 1, "background": False}
    values["evaluation"] = {"every": 2}
    recipe = write(values, tmp_path)
    longer = ["training.max_steps=6", f"checkpoint.resume={tmp_path / 'run'}"]
    done = train(recipe, [], longer, STARVING_RANK_NOTES=str(tmp_path))
    assert done.stdout.endswith("statuses [0, 0]\n"), f"{done.stdout}{done.stderr}"
    first, second = told(done)
    assert f"rank 1 on {HOST} ran out of memory, asking for 2.00 GiB, after step 2; going on from step 2 with" in first
    assert f"rank 1 on {HOST} ended for want of memory after step 4; going on from step 3 with" in second
    assert "(restart 2 of 4)" in second
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4, 5, 6]
    # Another command goes on with what was learned.
    learned = json.loads((tmp_path / "run" / "memory.json").read_text())["micro_batch_tokens"]
    assert learned < 32
    assert f"it goes on with micro-batches of at most {learned} tokens" in done.stdout
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["training"]["micro_batch_tokens"] == learned
