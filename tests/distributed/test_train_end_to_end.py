"""`understudy train` from a recipe to a model that plain transformers loads, with real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

pytestmark = pytest.mark.distributed

COMMAND = [sys.executable, "-m", "understudy"]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def write_tokenizer(directory: Path) -> None:
    special = ["<unk>", "<pad>", "<user>", "<assistant>", "<end>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)


def conversation(i: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": WORDS[i % 8]}, {"role": "assistant", "content": WORDS[(i + 1) % 8]}]
    }


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Learn to say the next number: 32 conversations, a random two-layer Llama."""
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(32)))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {
            "tokenizer": str(tmp_path / "tokenizer"),
            "init": "random",
            "config": {"model_type": "llama", "vocab_size": 16, "max_position_embeddings": 64, **sizes},
        },
        "data": {
            "train": [{"path": str(tmp_path / "data.jsonl")}],
            "eval": [{"path": str(tmp_path / "data.jsonl"), "max_samples": 8}],
            "max_length": 16,
            "num_workers": 1,
        },
        "optimizer": {"learning_rate": 2.0e-2},
        "training": {"max_steps": 60, "global_batch_size": 8, "precision": "fp32"},
        "evaluation": {"samples": 8},
        "strategy": "ddp",
        "cluster": {"processes": 2},
    }


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "UNDERSTUDY_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


def write(recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run(arguments: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environment(tmp_path), capture_output=True, text=True, timeout=240)


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def check_model(directory: Path) -> None:
    """Loads it as a user would, and lets it answer in its chat template."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.dtype == torch.float32
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "three"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "four"


def test_a_recipe_becomes_a_model_that_loads_and_answers(tmp_path: Path, recipe: dict[str, Any]) -> None:
    arguments = [*COMMAND, "train", str(write(recipe, tmp_path))]
    done = run(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert "reloaded with transformers" in done.stdout
    check_model(tmp_path / "run" / "model")

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


def test_torchrun_runs_the_same_command_under_another_strategy(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["strategy"] = "fsdp"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run([*torchrun, "-m", "understudy", "train", str(write(recipe, tmp_path))], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("reloaded with transformers") == 1
    check_model(tmp_path / "run" / "model")
    index = json.loads((tmp_path / "run" / "model" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2, "both ranks write their share"


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
    assert re.search(r"^error: rank 1 was killed by SIGKILL", errors)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers.values())
