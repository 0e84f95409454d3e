"""`understudy teacher generate`: stopped midway it goes on, to the same file, from which a student is trained."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.distributed import small_run
from tests.distributed.started_commands import DEADLINE_SECONDS, StartedCommand, start

pytestmark = pytest.mark.distributed

PROMPTS = 400
SAMPLING = ["--temperature", "0.8", "--top-p", "0.9", "--max-new-tokens", "40"]


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    recipe = small_run.small_recipe(tmp_path)
    rows = [small_run.conversation(i) for i in range(PROMPTS)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    del recipe["data"]["eval"], recipe["evaluation"]
    small_run.write_tokenizer(tmp_path / "teacher", [*small_run.WORDS[::-1], "eight"])  # another one than the student's
    torch.manual_seed(7)
    sizes = {name: value for name, value in recipe["model"]["config"].items() if name != "model_type"}
    config = LlamaConfig(**{**sizes, "num_hidden_layers": 8, "initializer_range": 0.3})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    teacher = {"kind": "cache", "path": str(tmp_path / "teacher")}
    small_run.write({**recipe, "objective": {"kind": "distillation", "teacher": teacher}}, tmp_path)
    return recipe


def test_answers_that_were_stopped_go_on_and_can_be_trained_on(tmp_path: Path, recipe: dict[str, Any]) -> None:
    environment = {"UNDERSTUDY_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def generate(output: str, processes: int, attempt: int = 0) -> StartedCommand:
        arguments = ["teacher", "generate", str(tmp_path / "recipe.yaml"), f"cluster.processes={processes}"]
        scratch = tmp_path / f"scratch-{output}-{attempt}"
        return start([*arguments, "-o", str(tmp_path / output), *SAMPLING], scratch, environment)

    whole, stopped = generate("whole.jsonl", 1), generate("answers.jsonl", 2)
    parts = tmp_path / "answers.jsonl.parts"
    deadline = time.monotonic() + DEADLINE_SECONDS
    while stopped.process.is_alive() and not any(path.stat().st_size for path in parts.glob("answers-*")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(stopped.pid, signal.SIGTERM)
    assert (stopped.status(), stopped.errors()) == (75, "stopped by SIGTERM; run the same command again to go on.\n")
    stopped.wait_for_workers_to_end()
    there = sum(path.read_bytes().count(b"\n") for path in parts.glob("answers-*"))
    assert 0 < there < PROMPTS
    assert not (tmp_path / "answers.jsonl").exists()

    again = generate("answers.jsonl", 1, attempt=1)
    assert (again.status(), whole.status()) == (0, 0), (again.errors(), whole.errors())
    assert f"answers {PROMPTS} prompts, of which {there} are answered" in again.said()
    content = (tmp_path / "answers.jsonl").read_bytes()
    assert content == (tmp_path / "whole.jsonl").read_bytes()
    assert not parts.exists()
    rows = [json.loads(line) for line in content.splitlines()]
    assert [row["messages"][:-1] for row in rows] == [
        small_run.conversation(i)["messages"][:-1] for i in range(PROMPTS)
    ]
    assert {row["messages"][-1]["role"] for row in rows} == {"assistant"}
    assert len({row["messages"][-1]["content"] for row in rows}) > PROMPTS // 2

    recipe["data"]["train"] = [{"path": str(tmp_path / "answers.jsonl")}]
    recipe["data"]["max_length"], recipe["training"]["max_steps"] = 64, 2
    student = tmp_path / "student.yaml"
    student.write_text(json.dumps(recipe))
    trained = start(["train", str(student), "cluster.processes=1"], tmp_path / "scratch-train", environment)
    assert trained.status() == 0, trained.errors()
    assert [row["step"] for row in small_run.rows(tmp_path) if "loss" in row] == [1, 2]
