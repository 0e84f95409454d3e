"""A recipe that a tiny random model learns in seconds, and what is read of its run."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.distributed.forked import run_command

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def write_tokenizer(directory: Path, words: Sequence[str] = WORDS) -> None:
    special = ["<unk>", "<pad>", "<user>", "<assistant>", "<end>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
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


def small_recipe(tmp_path: Path) -> dict[str, Any]:
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


def understudy(arguments: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """As `understudy …`, in forked processes."""
    return run_command(arguments, environment(tmp_path))


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return read_rows(tmp_path / "run")


def read_rows(run_directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


def check_model(directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Loads it as a user would, and lets it answer in its chat template. `dtype` is what its weights are stored in."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.dtype == dtype
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "three"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "four"
