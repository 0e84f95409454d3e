"""QLoRA on SmolLM2: a base of 4 bits under ZeRO-2, ZeRO-3 and FSDP2, 2 processes, bf16."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.forked import run_command
from tests.real.alpaca import evaluation_examples, mean_loss
from tests.real.conftest import RECIPE
from understudy.recipe.load import load_recipe
from understudy.training.adapting import adapted_model
from understudy.training.job import read_job

pytestmark = pytest.mark.real

STRATEGIES = ("zero2", "zero3", "fsdp")
BF16_ROUNDING = 1e-2
SHARED_OUT = ("zero3", "fsdp")


@pytest.fixture(scope="module")
def overrides(small_run: list[str]) -> list[str]:
    return [
        *small_run,
        "adapter=lora",
        "quantization={bits: 4, type: nf4, double: true}",
        "optimizer.learning_rate=2.0e-3",
        "training.max_steps=3",
    ]


@pytest.fixture(scope="module")
def runs(
    overrides: list[str], token_caches: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, str]]:
    """The finished run directory of each strategy, and what it printed."""
    environment = {**os.environ, "UNDERSTUDY_CACHE": str(token_caches), "HF_HUB_OFFLINE": "1"}
    finished = {}
    for strategy in STRATEGIES:
        directory = tmp_path_factory.mktemp("runs") / strategy
        arguments = [str(RECIPE), *overrides, f"strategy={strategy}", f"output_dir={directory}"]
        done = run_command(["train", *arguments], environment, timeout_seconds=600)
        assert done.returncode == 0, done.stderr
        finished[strategy] = directory, done.stdout
    return finished


def rows(directory: Path, key: str) -> list[Any]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def test_the_evaluation_loss_falls_and_is_the_same_under_each(
    runs: dict[str, tuple[Path, str]], overrides: list[str], token_caches: Path
) -> None:
    directories = {strategy: directory for strategy, (directory, _) in runs.items()}
    base = read_job(directories["fsdp"] / "job.json").model_directory
    documents = evaluation_examples(overrides, token_caches)
    before = mean_loss(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), documents)
    for strategy, directory in directories.items():
        [after] = rows(directory, "eval_loss")
        assert after < 0.985 * before, strategy
        for key in ("loss", "eval_loss"):
            assert rows(directory, key) == pytest.approx(rows(directories["fsdp"], key), rel=BF16_ROUNDING)


def test_the_base_is_shared_out(runs: dict[str, tuple[Path, str]]) -> None:
    job = read_job(runs["fsdp"][0] / "job.json")
    adapted = adapted_model(job.recipe, job.model_directory, job.adapter_directory)
    # Where every process holds everything, frozen weights are bf16 and packed ones as many bytes as they say.
    whole = sum(p.numel() * 2 for p in adapted.model.parameters() if not p.requires_grad)
    for strategy, (_, printed) in runs.items():
        found = re.search(r"each process holds ([\d,]+) bytes of frozen weights", printed)
        assert found is not None, printed
        held = int(found[1].replace(",", ""))
        assert held <= 0.55 * whole if strategy in SHARED_OUT else held == whole, strategy


def test_the_adapter_loads_with_plain_peft_and_scores_the_same(
    runs: dict[str, tuple[Path, str]], overrides: list[str], token_caches: Path
) -> None:
    directory, _ = runs["zero3"]
    base = read_job(directory / "job.json").model_directory
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loss = mean_loss(
        peft.PeftModel.from_pretrained(model, str(directory / "model")), evaluation_examples(overrides, token_caches)
    )
    assert rows(directory, "eval_loss")[-1] == pytest.approx(loss, rel=BF16_ROUNDING)


def test_the_recipe_of_the_run_is_one(runs: dict[str, tuple[Path, str]]) -> None:
    recipe, _ = load_recipe(runs["fsdp"][0] / "recipe.yaml")
    assert recipe.quantization is not None
    assert recipe.quantization.data_type == "nf4"
