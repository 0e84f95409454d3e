"""The recipe `smollm2-alpaca` for a few steps: bf16, 2 processes, FSDP2 and ZeRO-2."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.forked import run_command
from tests.real.alpaca import evaluation_examples, mean_loss, prepared
from tests.real.conftest import RECIPE

pytestmark = pytest.mark.real

STRATEGIES = ("fsdp", "zero2")
BF16_ROUNDING = 1e-2
"""Relative difference of losses: one rounding is 2^-8, and a loss averages many."""


@pytest.fixture(scope="module")
def runs(small_run: list[str], token_caches: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The finished run directory of each strategy."""
    environment = {**os.environ, "UNDERSTUDY_CACHE": str(token_caches), "HF_HUB_OFFLINE": "1"}
    directories = {strategy: tmp_path_factory.mktemp("runs") / strategy for strategy in STRATEGIES}
    for strategy, directory in directories.items():
        overrides = [*small_run, f"strategy={strategy}", f"output_dir={directory}"]
        done = run_command(["train", str(RECIPE), *overrides], environment, timeout_seconds=600)
        assert done.returncode == 0, done.stderr
    return directories


def rows(directory: Path, key: str) -> list[Any]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def test_training_lowers_the_evaluation_loss_that_plain_transformers_measures(
    runs: dict[str, Path], smollm2: Path, small_run: list[str], token_caches: Path
) -> None:
    documents = evaluation_examples(small_run, token_caches)
    before = mean_loss(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), documents)
    for strategy, directory in runs.items():
        trained = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
        after = mean_loss(trained, documents)
        assert after < 0.985 * before, strategy
        assert rows(directory, "eval_loss")[-1] == pytest.approx(after, rel=BF16_ROUNDING), strategy


def test_both_strategies_see_the_same_losses(runs: dict[str, Path]) -> None:
    for key in ("loss", "eval_loss"):
        assert rows(runs["fsdp"], key) == pytest.approx(rows(runs["zero2"], key), rel=BF16_ROUNDING)
    for key in ("tokens", "supervised_tokens", "learning_rate"):
        assert rows(runs["fsdp"], key) == rows(runs["zero2"], key)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_trained_model_answers_in_its_chat_template_and_stops(runs: dict[str, Path], strategy: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(runs[strategy] / "model")
    tokenizer = AutoTokenizer.from_pretrained(runs[strategy] / "model")
    assert model.dtype == torch.bfloat16
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert output[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.decode(output)
    assert "Paris" in tokenizer.decode(output, skip_special_tokens=True)


def test_a_second_start_reads_the_prepared_data_and_builds_nothing(small_run: list[str], tmp_path: Path) -> None:
    def state_on_disk() -> dict[Path, tuple[int, int]]:
        found = {path: path.stat() for path in tmp_path.rglob("*.arrow")}
        return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}

    first = prepared(small_run, tmp_path)
    built = state_on_disk()
    assert built
    assert prepared(small_run, tmp_path) == first
    assert state_on_disk() == built
